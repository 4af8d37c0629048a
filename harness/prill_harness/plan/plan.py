"""A gate and overrides in; an ordered plan of cells, their execution, and their merged records out."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

import msgspec

from prill_harness.engines.spec import fixture_sha256
from prill_harness.plan import provenance
from prill_harness.plan.given import named
from prill_harness.plan.policy import Gate
from prill_harness.records import ledger as ledgers
from prill_harness.records.catalog import suite_file
from prill_harness.records.evidence import Cell, CellEnded, CellStarted, Evidence, Record, Status
from prill_harness.run import pool
from prill_harness.run.pool import TIMEOUT_S, Event
from prill_runtime.errors import LedgerError, NothingSelected, PrillError, UsageError

LEAST_S, TIMES = 120.0, 20.0

__all__ = ["Event", "Plan", "build", "ledger_path", "merge", "resumable", "run", "shard"]


class Plan(msgspec.Struct, frozen=True):
    """The cells of one run, in order.

    Attributes:
        narrowed: models were overridden, so items of other architectures are left out of the verdict.
        checks: run these check ids alone; empty for all.
        folder: where the suites lie; None: the packaged ones.
        given: the spec that opens a model here, by the name that its cells carry; absent where they are one.
    """

    gate: str
    cells: tuple[Cell, ...]
    narrowed: bool = False
    checks: tuple[str, ...] = ()
    folder: Path | None = None
    given: Mapping[str, str] = {}

    def spec(self, cell: Cell) -> str:
        """The spec that opens the cell's model on this machine."""
        return self.given.get(cell.model, cell.model)


def build(
    gate: Gate,
    engines: Sequence[str] = (),
    models: Sequence[str] = (),
    suites: Sequence[str] = (),
    *,
    checks: Sequence[str] = (),
    folder: Path | None = None,
) -> Plan:
    """The gate's cells, engines and models replaced where given, suites and checks restricted where given.

    Cells carry the names of their models, which are the same on every machine.

    Raises:
        UsageError: a suite that the gate does not run, or that does not exist.
        NothingSelected: no cell is left.
    """
    offered = dict.fromkeys(s for entry in gate.plan for s in entry.suites)
    wanted = dict.fromkeys([*suites, *(check.partition(".")[0] for check in checks)])
    for suite in wanted:
        if suite not in offered:
            expected = " or ".join(offered)
            raise UsageError(
                "the gate has no such suite", where=gate.name, expected=expected, got=repr(suite)
            )
    names = named(models or [model for entry in gate.plan for model in entry.models])
    cells = [
        msgspec.structs.replace(cell, model=names[cell.model])
        for cell in cells_of(gate, engines, models)
        if not wanted or cell.suite in wanted
    ]
    for suite in dict.fromkeys(cell.suite for cell in cells):
        suite_file(suite, folder)
    if not cells:
        raise NothingSelected("the selection leaves no cell", where=f"gate {gate.name}")
    return Plan(gate.name, tuple(dict.fromkeys(cells)), bool(models), tuple(checks), folder, openers(names))


def openers(names: Mapping[str, str]) -> dict[str, str]:
    """Name -> the first spec of it, from `given.named`'s spec -> name."""
    return {name: spec for spec, name in reversed(list(names.items()))}


def cells_of(gate: Gate, engines: Sequence[str] = (), models: Sequence[str] = ()) -> tuple[Cell, ...]:
    """Every cell of the gate once, in order, with engines and models replaced where given."""
    cells = (
        Cell(model, engine, suite, device)
        for entry in gate.plan
        for model, engine, suite, device in product(
            models or entry.models, engines or entry.engines, entry.suites, entry.devices
        )
    )
    return tuple(dict.fromkeys(cells))


def shard(plan: Plan, index: int, count: int) -> Plan:
    """Part `index` (from 1) of `count`: every cell is in exactly one part, whatever the order of the plan.

    Raises:
        UsageError: index or count out of range.
        NothingSelected: more parts than cells.
    """
    if not 1 <= index <= count:
        raise UsageError("no such shard", expected=f"1/{count} to {count}/{count}", got=f"{index}/{count}")
    mine = set(sorted(plan.cells, key=lambda cell: cell.id)[index - 1 :: count])
    if not mine:
        raise NothingSelected("the shard is empty", got=f"{index}/{count} of {len(plan.cells)} cells")
    return msgspec.structs.replace(plan, cells=tuple(cell for cell in plan.cells if cell in mine))


def ledger_path(out: Path, cell: Cell) -> Path:
    """Where a cell's own ledger lies: a readable name and a digest, so that no two cells share one."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", cell.id)[-80:].strip("-.")
    return out / "cells" / f"{readable}-{hashlib.sha256(cell.id.encode()).hexdigest()[:8]}.jsonl"


def run(
    plan: Plan,
    out: Path,
    jobs: int = 0,
    resume: bool = False,
    progress: Callable[[Event], None] = lambda event: None,
    *,
    timeout_s: float | None = None,
) -> tuple[Record, ...]:
    """Run the cells, each in a fresh process; write out/cells/*.jsonl and out/ledger.jsonl; the records.

    Args:
        jobs: processes at a time; 0: one for each core.
        resume: keep cells whose final record stands and whose code and model are unchanged.
        timeout_s: per cell; the check then in flight becomes an error. None: TIMES times what the cell took
            in this folder before, LEAST_S at least; TIMEOUT_S where it never ran.

    Raises:
        KeyboardInterrupt: the ledgers written so far are kept, the processes ended.
    """
    jobs = jobs or os.cpu_count() or 2
    paths = {cell: ledger_path(out, cell) for cell in plan.cells}
    (out / "cells").mkdir(parents=True, exist_ok=True)
    kept = [cell for cell in plan.cells if resume and resumable(paths[cell], cell, plan)]
    todo = [(cell, plan.spec(cell), paths[cell]) for cell in plan.cells if cell not in kept]
    took = {cell: _took(path) for cell, _, path in todo}
    for *_, path in todo:  # what an earlier run left may not stand in for this one
        path.unlink(missing_ok=True)
    done = 0

    def tell(kind: str, cell: Cell) -> None:
        nonlocal done
        done += kind != "started"
        over = kind != "started" and paths[cell].exists()
        records = ledgers.read(paths[cell]) if over else ()
        counts = Counter(r.status.value for r in records if isinstance(r, Evidence))
        progress(Event(kind, cell, done, len(plan.cells), dict(counts)))

    for cell in kept:
        tell("resumed", cell)
    try:
        pool.run(
            todo,
            jobs=jobs,
            folder=plan.folder,
            checks=plan.checks,
            timeout_s={cell: timeout_s or patience(took[cell]) for cell in took},
            started=lambda cell: tell("started", cell),
            ended=lambda cell: tell("ended", cell),
        )
    finally:
        records = gather(paths.values(), out / "ledger.jsonl")
    return records


def patience(took_s: float | None) -> float:
    """Seconds that a cell is given which took so many before; None: it never ran."""
    return TIMEOUT_S if took_s is None else max(LEAST_S, TIMES * took_s)


def _took(ledger: Path) -> float | None:
    """What a cell's ledger says it took."""
    with contextlib.suppress(PrillError, OSError):
        return next((r.duration_s for r in ledgers.read(ledger) if isinstance(r, CellEnded)), None)
    return None


def gather(paths: Iterable[Path], target: Path) -> tuple[Record, ...]:
    """The cells' ledgers as one file, written whole or not at all."""
    records = tuple(r for path in paths if path.exists() for r in ledgers.read(path))
    partial = target.with_suffix(".partial")
    partial.write_bytes(ledgers.lines(records))
    partial.replace(target)
    return records


def resumable(path: Path, cell: Cell, plan: Plan) -> bool:
    """True when the ledger holds a final record, evidence of every planned check, and today's versions."""
    if not path.exists():
        return False
    try:
        records = ledgers.audited(path)
    except PrillError:
        return False
    starts = [r for r in records if isinstance(r, CellStarted)]
    ends = [r for r in records if isinstance(r, CellEnded)]
    if len(starts) != 1 or len(ends) != 1 or any(r.cell != cell for r in records):
        return False
    if any(isinstance(r, Evidence) and r.status is Status.ERROR for r in records):
        return False  # what stopped once may go on now
    reported = {r.check for r in records if isinstance(r, Evidence)}
    if not starts[0].planned or set(starts[0].planned) != reported:
        return False
    today = provenance.describe(plan.spec(cell), suite_file(cell.suite, plan.folder), plan.checks)
    return starts[0].versions == today


def _of_one_prill(cells: Mapping[Cell, tuple[Path, list[Record]]]) -> None:
    """Ledgers that are put together come from one version of prill, and its fixtures are the committed ones.

    Raises:
        LedgerError: they do not.
    """
    first: tuple[Path, str] | None = None
    for cell, (path, records) in cells.items():
        for record in records:
            if not isinstance(record, CellStarted) or not record.versions:
                continue
            mine = path, record.versions.get("prill", "")
            first = first or mine
            if mine[1] != first[1]:
                raise LedgerError(
                    "the ledgers come from two versions of prill",
                    where=f"{first[0]} and {path}",
                    expected=first[1],
                    got=mine[1],
                    hint="run all shards with one",
                )
            digest, recorded = record.versions.get("model_sha256", ""), fixture_sha256(cell.model)
            if recorded and digest and digest != recorded:
                raise LedgerError(
                    "a cell ran on another file than the packaged fixture",
                    where=f"{path}, {cell.id}",
                    expected=f"sha256 {recorded[:16]}…",
                    got=f"{digest[:16]}…",
                )


def merge(paths: Sequence[Path], plan: Plan | None = None) -> tuple[Record, ...]:
    """One set of records from several ledgers; the same ledger twice counts once.

    Raises:
        LedgerError: two ledgers differ about one cell, or, with `plan`, a cell is missing or not planned.
    """
    cells: dict[Cell, tuple[Path, list[Record]]] = {}
    for path in paths:
        if not path.is_file():
            raise LedgerError("no such ledger", where=str(path))
        mine: dict[Cell, list[Record]] = {}
        for record in ledgers.audited(path):
            mine.setdefault(record.cell, []).append(record)
        for cell, records in mine.items():
            first, known = cells.setdefault(cell, (path, records))
            if known != records:
                raise LedgerError("a cell was run twice", where=f"{first} and {path}", got=cell.id)
    _of_one_prill(cells)
    if plan is not None:
        missing = [cell.id for cell in plan.cells if cell not in cells]
        extra = sorted(cell.id for cell in cells.keys() - set(plan.cells))
        if missing or extra:
            what = "planned cells are missing" if missing else "cells are not in the plan"
            raise LedgerError(what, where=f"gate {plan.gate}", got=", ".join(missing or extra))
    return tuple(r for cell in sorted(cells) for r in cells[cell][1])
