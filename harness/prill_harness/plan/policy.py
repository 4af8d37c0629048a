"""Read gates.toml; gates with inheritance resolved.

```toml
default = "architectures"            # the gate that `prill gate` runs when none is named
suites = "../checks"                 # optional: a folder of your own suites, from this file, beside prill's

[gates.foundation]
checklists = ["foundation"]          # files of the checklists folder, without .toml
blocks_at = "medium"                 # an item at least this severe must be proven
minimum_executed = 30                # evidence that passed or failed, at least
max_inconclusive = 0
max_flaky = 0                        # checks whose evidence disagrees with itself
never_waive = ["cache.leak"]         # items that no waiver may cover
cells_per_gpu = 1                    # cells at a time on one GPU
may_lack = ["batch"]                 # what an engine may say that it does not have: checks that need it are
                                     # listed, and count as neither passed nor inconclusive
incidents_block_at = "high"          # open incidents at least this severe; default, and always, critical
leak_budget = 0                      # optional: bytes a call that what is waived may leak, all together
performance_budget = 10.0            # optional: percent that an engine may be slower than its baseline
documents = ["README.md"]            # files that must be there, from the folder in which the gate runs
[[gates.foundation.plan]]            # every combination of these is a cell
models = ["fixture:llama-tiny"]
engines = ["numpy"]
suites = ["file", "ops"]
devices = ["cpu"]                    # optional

[gates.architectures]
extends = "foundation"               # checklists, never_waive, documents and plan are added to the parent's,
blocks_at = "low"                    # any other key replaces the parent's
```
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from prill_harness.engines.base import Capability
from prill_harness.plan import beside
from prill_harness.plan.provenance import file_digest
from prill_harness.records.catalog import packaged
from prill_harness.records.names import look_up
from prill_harness.records.strict import line_of, load_toml
from prill_harness.records.verdict import Severity
from prill_runtime.errors import PolicyError, UsageError

LOCAL_POLICY = Path("ci/gates.toml")


class PlanEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cells models x engines x suites x devices."""

    models: tuple[str, ...]
    engines: tuple[str, ...]
    suites: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu",)


class _GateFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    extends: str = ""
    checklists: tuple[str, ...] = ()
    never_waive: tuple[str, ...] = ()
    plan: tuple[PlanEntry, ...] = ()
    blocks_at: Severity | None = None
    minimum_executed: int | None = None
    max_inconclusive: int | None = None
    max_flaky: int | None = None
    cells_per_gpu: int | None = None
    may_lack: tuple[str, ...] | None = None
    incidents_block_at: Severity | None = None
    leak_budget: int | None = None
    performance_budget: float | None = None
    documents: tuple[str, ...] = ()


class _PolicyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    default: str
    gates: dict[str, _GateFile]
    suites: str = ""


class Gate(msgspec.Struct, frozen=True):
    """One gate, inheritance resolved; `chain` names it and its parents, itself first.

    Attributes:
        leak_budget: bytes a call; performance_budget: percent; None: nothing is asked about either.
    """

    name: str
    chain: tuple[str, ...]
    checklists: tuple[str, ...]
    never_waive: frozenset[str]
    plan: tuple[PlanEntry, ...]
    blocks_at: Severity
    minimum_executed: int
    max_inconclusive: int
    max_flaky: int
    may_lack: frozenset[str] = frozenset()
    incidents_block_at: Severity = Severity.CRITICAL
    cells_per_gpu: int = 1
    leak_budget: int | None = None
    performance_budget: float | None = None
    documents: tuple[str, ...] = ()

    def blocks(self, severity: Severity) -> bool:
        """Whether an item of this severity must be proven for the gate to pass."""
        return severity.rank <= self.blocks_at.rank


class Policy(msgspec.Struct, frozen=True):
    """A whole policy file.

    Attributes:
        folder: of the user's own suites (`plan.beside`); None where it names none.
    """

    path: Path
    sha256: str
    default: str
    gates: dict[str, Gate]
    folder: Path | None = None

    def gate(self, name: str | None = None) -> Gate:
        """The gate of that name, or the default.

        Raises:
            UsageError: no such gate. PolicyError: the default does not exist.
        """
        error = UsageError if name else PolicyError
        look_up(name or self.default, self.gates, "no such gate", where=str(self.path), error=error)
        return self.gates[name or self.default]


def default_gate() -> Gate:
    """The default gate of the packaged policy, which is the same in every folder."""
    return load_policy(packaged() / "gates.toml").gate()


def load_policy(path: Path | None = None) -> Policy:
    """Read a policy: `path`, or ci/gates.toml of the current folder, or the packaged one.

    Raises:
        PolicyError: unreadable, unknown keys, unknown or circular `extends`, or a gate without cells.
    """
    path = Path(path) if path else LOCAL_POLICY if LOCAL_POLICY.is_file() else packaged() / "gates.toml"
    file = load_toml(path, _PolicyFile)
    gates = {name: _resolve(path, file.gates, name) for name in file.gates}
    folder = (path.parent / file.suites).resolve() if file.suites else None
    beside.examine(folder)
    policy = Policy(path, file_digest(path), file.default, gates, folder)
    policy.gate()
    return policy


def _resolve(path: Path, files: dict[str, _GateFile], name: str) -> Gate:
    chain: list[str] = []
    parent = name
    while parent:
        place = f"{path}{line_of(path, 'extends =', chain[-1])}" if chain else ""
        where = f"{place} - at `$.gates.{chain[-1]}.extends`" if chain else str(path)
        if parent in chain:
            raise PolicyError("gates extend one another in a circle", where=where, got=repr(parent))
        look_up(parent, files, "extends a gate that does not exist", where=where, error=PolicyError)
        chain.append(parent)
        parent = files[parent].extends
    oldest_first = [files[link] for link in reversed(chain)]

    def at(key: str) -> str:
        lines = (line_of(path, f"{key} =" if key else "", gate) for gate in chain)
        return f"{path}{next(filter(None, lines), '')} - at `$.gates.{name}{key and '.'}{key}`"

    def latest(field: str, default: object) -> object:
        given = [getattr(f, field) for f in oldest_first if getattr(f, field) is not None]
        return given[-1] if given else default

    values = {
        "blocks_at": latest("blocks_at", Severity.LOW),
        "minimum_executed": latest("minimum_executed", 1),
        "max_inconclusive": latest("max_inconclusive", 0),
        "max_flaky": latest("max_flaky", 0),
        "incidents_block_at": latest("incidents_block_at", Severity.CRITICAL),
        "cells_per_gpu": latest("cells_per_gpu", 1),
        "leak_budget": latest("leak_budget", None),
        "performance_budget": latest("performance_budget", None),
    }
    for field in [field for field, value in values.items() if isinstance(value, int | float)]:
        lowest = 1 if field in ("minimum_executed", "cells_per_gpu") else 0
        if not float(str(values[field])) >= lowest:  # a NaN is no budget
            raise PolicyError(
                "out of range", where=at(field), expected=f"at least {lowest}", got=values[field]
            )
    may_lack: tuple[str, ...] = latest("may_lack", ())  # type: ignore[assignment]
    for capability in may_lack:
        what = "no such capability of an engine"
        look_up(capability, list(Capability), what, where=at("may_lack"), error=PolicyError)
    gate = Gate(
        name=name,
        chain=tuple(chain),
        checklists=tuple(dict.fromkeys(c for f in oldest_first for c in f.checklists)),
        never_waive=frozenset(i for f in oldest_first for i in f.never_waive),
        plan=tuple(e for f in oldest_first for e in f.plan),
        may_lack=frozenset(may_lack),
        documents=tuple(dict.fromkeys(d for f in oldest_first for d in f.documents)),
        **values,  # type: ignore[arg-type]
    )
    if not any(e.models and e.engines and e.suites and e.devices for e in gate.plan):
        raise PolicyError("a gate needs a plan with at least one cell", where=at(""))
    if not gate.checklists:
        raise PolicyError("a gate needs at least one checklist", where=at(""))
    return gate
