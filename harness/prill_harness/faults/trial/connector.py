"""What checks were seen to find through the connector of one engine, and what a gate counts by it.

A planted fault of prill's own code says that a check can see, not that it sees through somebody's server. So
any engine can be given a changed file, or have its answers spoiled on their way (`faults.blackbox`), and what
each check makes of that is kept in the user's cache, by the engine's spec. A gate counts a check of an engine
of others only when it was seen to find something there, with the code that it has now.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from prill_harness.engines.models import resolve_model
from prill_harness.engines.spec import FAULT, EngineSpec
from prill_harness.faults.blackbox.answers import Answer
from prill_harness.faults.blackbox.changed import NUMBERS, TOKENIZER, Change, planted
from prill_harness.faults.blackbox.planted import BLACKBOX
from prill_harness.faults.opening import has_model
from prill_harness.faults.trial import blame as blaming
from prill_harness.faults.trial.kills import FaultTrial
from prill_harness.records import catalog
from prill_harness.records.evidence import ENGINE_VERSION, Cell, CellStarted, Evidence, Record, Status
from prill_harness.records.files import write_file
from prill_harness.records.names import suite_of
from prill_harness.run import reproduce
from prill_runtime import user_cache

SUITES = ("contract", "tokens")
OF_PRILL = ("harness", "witness")  # judge prill, whatever the engine
# Nothing can be planted in somebody's library or process, so the defects that these find are those of the
# example, which is reached by the same connector: the catalogue's kills are kills through it.
OF_EXAMPLES = {"boundary": ("capi",), "process": ("capi", "exec")}
SIGHT = "contract.sees_"  # checks that put faults before the engine themselves, and note what was found
REQUESTS = "requests"
FILES = "engine_sha256"
# Parts by prefixes of failing checks; the first that fails explains those below it.
PARTS = (
    (TOKENIZER, ("contract.tokenization", "contract.round_trip", "tokens.prompt_ids", "tokenizer.")),
    (NUMBERS, ("contract.tokens", "contract.logprobs", "contract.raw_logprobs", "tokens.", "stages.")),
    (REQUESTS, ("",)),
)
SECRET = re.compile(r"(?i)((?:key|token|secret|password|bearer)\w*[=:\s]+)[^\s,]+")


class Sight(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was seen through one connector.

    Attributes:
        engine: its spec, without what may be a secret. build: what it was when that was seen (`builds`).
        checks: content hash of each check that was run, by id without parameter.
        faults: each fault that was put before it.
    """

    engine: str
    checks: dict[str, str] = {}
    faults: dict[str, FaultTrial] = {}
    schema: int = 1
    build: str = ""

    def counts(self, evidence: Evidence, build: str) -> bool:
        """Whether the check, with its present code, was seen to find something in this build of the
        engine."""
        same = self.build == build and self.checks.get(evidence.base) == evidence.content
        return same and any(evidence.base in trial.killed_by for trial in self.faults.values())


@dataclass(frozen=True)
class ConnectorTrial:
    """One fault before one engine; `model` is the first that has what the fault changes."""

    fault: Change | Answer
    engine: str
    model: str
    suites: tuple[str, ...]

    @property
    def cell(self) -> Cell:
        return Cell(self.model, f"{self.engine}{FAULT}{self.fault.name}", "+".join(self.suites))


@dataclass(frozen=True)
class Found:
    """What came of a trial.

    Attributes:
        blamed: the part that is found wrong; empty if none is, or only by suites of somebody's own, which
            name no part.
        unsaid: why nothing can be said, where the check that is about the fault is itself inconclusive.
    """

    trial: ConnectorTrial
    killed_by: tuple[str, ...]
    blamed: str
    because: str
    unsaid: str = ""

    @property
    def right(self) -> bool:
        fault = self.trial.fault
        if isinstance(fault, Answer):
            return fault.kills in self.killed_by
        return self.blamed == fault.blames or (bool(self.killed_by) and not self.blamed)

    @property
    def sentence(self) -> str:
        fault = self.trial.fault
        owed = fault.kills if isinstance(fault, Answer) else fault.blames
        if self.unsaid:
            return f"{fault.name}: nothing can be said, {self.unsaid}"
        if not self.killed_by:
            return (
                f"{fault.name} is not seen through this connector ({fault.summary.lower()}): {owed} is owed"
            )
        by, rightly = ", ".join(self.killed_by[:4]), "rightly" if self.right else f"wrongly: {owed} is owed"
        if not self.blamed:
            return f"{fault.name} is killed by {by}"
        return f"{fault.name} is killed by {by}; {self.blamed} is blamed, {rightly}"


def masked(spec: str) -> str:
    """The spec without what may be a secret."""
    return SECRET.sub(r"\1***", spec)


def place(spec: str) -> Path:
    """Where the record of an engine lies.

    Raises:
        UsageError: the cache cannot be used.
    """
    return user_cache.folder("connectors") / f"{hashlib.sha256(masked(spec).encode()).hexdigest()[:24]}.json"


def load(spec: str) -> Sight:
    """The record of an engine; an empty one, by which nothing counts, if there is none that is whole."""
    file = place(spec)
    try:
        if user_cache.whole(file):
            return msgspec.json.decode(file.read_bytes(), type=Sight)
    except (OSError, msgspec.DecodeError):
        pass
    return Sight(masked(spec))


def keep(spec: str, sight: Sight) -> Path:
    """Write the record of an engine; faults that it does not have stay as they were seen with the same code
    and the same build of the engine.

    Raises:
        UsageError: the cache cannot be used.
    """
    before = load(spec)
    if before.build != sight.build:
        before = Sight(masked(spec))
    stale = {check for check, content in sight.checks.items() if before.checks.get(check, content) != content}
    old = {
        name: msgspec.structs.replace(trial, killed_by=tuple(c for c in trial.killed_by if c not in stale))
        for name, trial in before.faults.items()
    }
    checks, faults = before.checks | sight.checks, old | sight.faults
    whole = Sight(masked(spec), checks, faults, build=sight.build)
    data = msgspec.json.format(msgspec.json.encode(whole, order="sorted"), indent=1)
    user_cache.put(file := place(spec), lambda path: write_file(path, data.decode()))
    return file


def trials(
    spec: str, models: Sequence[str], suites: Sequence[str], only: Sequence[str] = ()
) -> list[ConnectorTrial]:
    """A trial for each fault that one of the models has what it takes for."""
    found, fixed = [], has_model(EngineSpec.parse(spec))
    for name, fault in BLACKBOX.items():
        if only and name not in only:
            continue
        if isinstance(fault, Answer):
            about = dict.fromkeys([suite_of(fault.kills), *suites])
            found.append(ConnectorTrial(fault, spec, models[0], tuple(about)))
        elif (model := next((m for m in models if _takes(fault, m)), None)) is not None:
            # An engine that keeps its file is judged by a changed one, of which there is no golden.
            mine = tuple(suite for suite in suites if not fixed or suite == SUITES[0])
            found += [ConnectorTrial(fault, spec, model, mine)] if mine else []
    return found


def _takes(change: Change, model: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        return planted(change, resolve_model(model), Path(folder)) is not None


def cells(wanted: Sequence[ConnectorTrial]) -> tuple[Cell, ...]:
    """One process for each trial, and one for each suite and model without a fault."""
    sound = {Cell(t.model, t.engine, suite): None for t in wanted for suite in t.suites}
    return (*sound, *(trial.cell for trial in wanted))


def judge(wanted: Sequence[ConnectorTrial], records: Iterable[Record]) -> list[Found]:
    """What came of each trial, against the same engine without a fault."""
    by_engine: dict[tuple[str, str], list[Evidence]] = defaultdict(list)
    for record in records:
        if isinstance(record, Evidence):
            by_engine[record.cell.model, record.cell.engine].append(record)
    return [_found(t, by_engine[t.model, t.cell.engine], by_engine[t.model, t.engine]) for t in wanted]


def _found(trial: ConnectorTrial, seen: Sequence[Evidence], sound: Sequence[Evidence]) -> Found:
    killed = blaming.kills(seen, sound)
    part, because = next(
        (
            (part, e.sentence)
            for part, begins in PARTS
            for e in killed
            if e.base.startswith(begins) and suite_of(e.base) in catalog.suites()
        ),
        ("", ""),
    )
    unsaid = ""
    if isinstance(trial.fault, Answer):
        about = [e for e in (*sound, *seen) if e.base == trial.fault.kills]
        unsaid = next((f"{e.base}: {e.sentence}" for e in about if e.status is Status.INCONCLUSIVE), "")
        failed = next((e for e in sound if e.base == trial.fault.kills and e.status is Status.FAILED), None)
        if failed is not None:
            unsaid = f"{failed.base} fails without it: {failed.sentence}"
    return Found(trial, tuple(sorted({e.base for e in killed})), part, because, unsaid)


def recorded(spec: str, found: Iterable[Found], records: Iterable[Record]) -> Sight:
    """The record of these trials."""
    records = list(records)
    contents = {r.base: r.content for r in records if isinstance(r, Evidence) and r.content}
    faults = {
        f.trial.fault.name: FaultTrial(
            source=hashlib.sha256(f.trial.fault.summary.encode()).hexdigest(),
            area="file" if isinstance(f.trial.fault, Change) else "answer",
            summary=f.trial.fault.summary,
            blames=(f.trial.fault.blames if isinstance(f.trial.fault, Change) else f.trial.fault.kills,),
            model=f.trial.model,
            blamed=(f.blamed,) if f.blamed else (),
            killed_by=f.killed_by,
        )
        for f in found
    }
    return Sight(masked(spec), contents, faults, build=builds(records)[spec])


def builds(records: Iterable[Record]) -> Mapping[str, str]:
    """What each engine was, by its spec without faults: the digests of the files that it names, and every
    version that it told; empty where neither is known."""
    found: dict[str, set[str]] = defaultdict(set)
    for each in records:
        facts = (each.versions if isinstance(each, CellStarted) else
                 each.digests if isinstance(each, Evidence) else {})  # fmt: skip
        spec = each.cell.engine.partition(FAULT)[0]
        found[spec] |= {f"{name} {facts[name]}" for name in (FILES, ENGINE_VERSION) if facts.get(name)}
    return defaultdict(str, {spec: "; ".join(sorted(told)) for spec, told in found.items()})


def counted(records: Iterable[Record], sights: Mapping[str, Sight]) -> list[Record]:
    """The records as a gate counts them: what passed on an engine of others without having been seen to find
    anything through its connector, by the record or by this very run, is inconclusive.

    Args:
        sights: the record of each engine of others, by its spec.
    """
    records = list(records)
    build = builds(records)
    here: dict[str, set[str]] = defaultdict(set)
    for each in records:
        if isinstance(each, Evidence) and each.check.startswith(SIGHT):
            here[each.cell.engine] |= {each.base, *each.detail.get("killed", ())}
    return [
        _unseen(each, sight.build != build[each.cell.engine] and bool(sight.checks))
        if isinstance(each, Evidence)
        and each.status is Status.PASSED
        and (sight := sights.get(each.cell.engine)) is not None
        and each.base not in here[each.cell.engine]
        and each.cell.suite not in OF_PRILL
        and EngineSpec.parse(each.cell.engine).name not in OF_EXAMPLES.get(each.cell.suite, ())
        and not sight.counts(each, build[each.cell.engine])
        else each
        for each in records
    ]


def _unseen(evidence: Evidence, other: bool) -> Evidence:
    """The evidence, counted for nothing; `other`: what was seen was another build of the engine."""
    said = shlex.split(evidence.reproduce)
    model = said[said.index("--model") + 1] if "--model" in said else evidence.cell.model
    words = reproduce.words("matrix", engine=evidence.cell.engine, model=model, suite=evidence.cell.suite)
    again = reproduce.shell(["faults", *words])
    what = (
        "not seen to kill in this build of the engine, only in another"
        if other
        else ("not seen to kill through this connector")
    )
    sentence = f"{what}, so it counts for nothing; see it with `{again}`"
    return msgspec.structs.replace(evidence, status=Status.INCONCLUSIVE, sentence=sentence)
