"""`prill faults`: what the planted faults are, which checks kill them and what is blamed."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prill_harness.commands.shared import runs
from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console
from prill_harness.records.files import write_file
from prill_harness.records.names import look_up
from prill_runtime.errors import NothingSelected, UsageError

if TYPE_CHECKING:
    from prill_harness.faults.trial.clean import CleanRun
    from prill_harness.faults.trial.matrix import TrialResult, TrialSubject
    from prill_harness.plan.policy import Gate
    from prill_harness.records.evidence import Cell, Record

JOBS = click.option(
    "-j", "--jobs", type=click.IntRange(min=0), default=0, help="Processes at a time; 0: one per core."
)
CLEAN = 210  # runs of sound engines in a whole matrix


@click.group(name="faults", epilog="\b\nExample:\n  prill faults run rope_base_default")
def command() -> None:
    """Show planted faults, and see that the checks find them."""


@declare(parent=command, name="list", example="prill faults list --json")
def listing(console: Console) -> int:
    """List every planted fault: name, area, what it breaks, what has to be blamed."""
    from prill_harness.faults.catalogue import catalogue

    known = [fault for engine in ("numpy", "emu") for fault in catalogue(engine).values()]
    shown = ("name", "area", "engine", "summary", "blames", "needs", "lacks", "models")
    console.emit({"faults": [{key: getattr(fault, key) for key in shown} for fault in known]})
    console.table(
        ("fault", "area", "blames", "what is wrong"),
        [(f.name, f.area, " or ".join(f.blames), f.summary) for f in known],
    )
    on_device = sum(fault.engine == "emu" for fault in known)
    console.line(
        f"{len(known)} faults; open an engine with one as numpy+fault:NAME, "
        f"with the last {on_device}, of a device, as emu+fault:NAME"
    )
    return 0


@declare(parent=command, name="show", example="prill faults show rope_base_default")
@click.argument("name")
def show(console: Console, name: str) -> int:
    """Show the fault NAME: what is wrong, its code, and who was seen to kill it."""
    from prill_harness.engines.features import in_words
    from prill_harness.faults.catalogue import catalogue, named
    from prill_harness.faults.trial import kills as matrix

    (fault,) = named([name])
    seen = matrix.fresh(matrix.load(), catalogue()).faults.get(name)
    killed_by, blamed = (seen.killed_by, seen.blamed) if seen else ((), ())
    console.emit(
        {
            "name": fault.name, "area": fault.area, "summary": fault.summary, "blames": fault.blames,
            "needs": fault.needs, "lacks": fault.lacks, "models": fault.models, "source": fault.source,
            "killed_by": killed_by, "blamed": blamed,
        }
    )  # fmt: skip
    console.line(f"{fault.name} ({fault.area}): {fault.summary}")
    console.line(f"has to be blamed: {' or '.join(fault.blames)}; shows on {', '.join(fault.models)}")
    if fault.needs or fault.lacks:
        console.line(f"needs a model {in_words(fault.needs, fault.lacks)}")
    console.line(
        f"killed by: {', '.join(killed_by) or 'nobody yet'}; blamed: {' or '.join(blamed) or 'nobody yet'}"
    )
    console.line(f"plant it: --engine {fault.engine}+fault:{fault.name} --model {fault.models[0]}")
    console.line()
    for line in inspect.cleandoc(fault.source).splitlines():
        console.line(line)
    return 0


@declare(
    parent=command,
    name="run",
    example="prill faults run rope_base_default\nprill faults run rope_pairing+rope_base_default -j 2",
)
@click.argument("names", nargs=-1, required=True, metavar="NAME[+NAME]...")
@JOBS
def run(console: Console, names: Sequence[str], jobs: int) -> int:
    """Run the suites against each NAME; several joined by + are planted together.

    Exit code 0 when every one is killed and blamed rightly, 1 when one survives or is blamed wrongly.
    """
    from prill_harness.faults.catalogue import named
    from prill_harness.faults.trial import matrix

    subjects = [matrix.TrialSubject(named(name.split("+"))) for name in dict.fromkeys(names)]
    results, _ = _trials(console, subjects, jobs)
    console.emit({"faults": [_described(result) for result in results]})
    for result in results:
        console.line(result.sentence, status="ok" if result.right else "failed")
    return 0 if all(result.right for result in results) else 1


@declare(
    parent=command,
    name="matrix",
    example="prill faults matrix -j 2\n"
    "prill faults matrix --only rope --only gelu_erf -o kills.json --docs FAULTS.md\n"
    "prill faults matrix --engine http://localhost:8080 --model ./model.gguf",
    judges=True,
)
@click.option("--engine", metavar="SPEC", help="Put changed files and spoiled answers before it.")
@click.option("--model", "models", multiple=True, metavar="SPEC", help="With --engine; repeatable.")
@click.option("--suites", "folder", metavar="FOLDER",
              type=click.Path(path_type=Path, file_okay=False, exists=True),
              help="Only the suites of your own in FOLDER; writes FOLDER/kills.json.")  # fmt: skip
@click.option("--suite", "suites", multiple=True, metavar="SUITE", help="With --engine; repeatable.")
@click.option("--only", multiple=True, metavar="AREA|NAME", help="These faults alone; repeatable.")
@click.option(
    "--clean", type=click.IntRange(min=0), metavar="N", help="Clean runs; default 210, with --only none."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write kills.json; with --only into it.",
)
@click.option("--docs", type=click.Path(path_type=Path, dir_okay=False), help="Write the page of the matrix.")
@JOBS
def matrix_(
    console: Console,
    engine: str | None,
    models: Sequence[str],
    folder: Path | None,
    suites: Sequence[str],
    only: Sequence[str],
    clean: int | None,
    output: Path | None,
    docs: Path | None,
    jobs: int,
) -> int:
    """Run the suites against every planted fault, and sound engines on random text.

    Exit code 1 when a fault survives or is blamed wrongly, a check does not kill what it claims, a sound
    engine alarms, or a kill or an amount on record was lost without a line in forgotten.toml.

    With --engine, any engine's: it is given changed files, and its answers are spoiled on their way. What its
    checks find is kept for its gates.
    """
    if folder is not None:
        if engine is not None or models or suites or only or clean or output or docs:
            raise UsageError("--suites goes with no other option than -j")
        return _own(console, folder, jobs)
    if engine is not None:
        from prill_harness.commands.gates import through

        return through.matrix(console, engine, models, suites, only, output, jobs)
    if models or suites:
        raise UsageError("--model and --suite go with --engine")
    from prill_harness.faults.catalogue import catalogue
    from prill_harness.faults.trial import clean as sound
    from prill_harness.faults.trial import forgotten, matrix, page
    from prill_harness.faults.trial import kills as data
    from prill_harness.plan.policy import default_gate

    recorded, lines = data.load(output if output and output.is_file() else None), forgotten.load()
    subjects = [matrix.TrialSubject((catalogue()[name],)) for name in _selected(only)]
    results, records = _trials(console, subjects, jobs, None if only else default_gate())
    count = clean if clean is not None else (0 if only else CLEAN)
    drawn: list[CleanRun] = []
    if count:
        with console.progress(len(sound.MODELS), "clean runs") as bar:
            drawn = sound.run(
                count, jobs or os.cpu_count() or 2, lambda model: bar.step(f"clean runs of {model}")
            )
    alarms, checks = matrix.alarms(records)
    trials = {result.subject.name: result.trial() for result in results}
    amounts = forgotten.amounts(records)
    seen = data.Kills(
        trials, matrix.contents(records), sound.summary(drawn, checks, len(alarms)), observed=amounts
    )
    if only:
        seen = data.merge(data.fresh(recorded, catalogue()), seen)
    seen = forgotten.kept(recorded, seen, lines)
    fell = forgotten.fallen(seen.observed, amounts, absent=True)
    owed = {name: checks for name, checks in seen.owed.items() if not only or name in trials}
    if output:
        write_file(output, data.encode(seen))
    if docs:
        write_file(docs, page.render(seen))
    claimed = matrix.claims()
    unkept = matrix.unkept(claimed, {result.subject.name: result.killed_by for result in results})
    false = [f"{e.check} alarms on the clean engine with {e.cell.model}: {e.sentence}" for e in alarms]
    false += [f"clean run {r.seed} on {r.model} alarms: {r.alarm}" for r in drawn if r.alarm]
    console.emit(
        {
            "faults": [_described(r) for r in results],
            "alarms": false,
            "unkept_claims": unkept,
            "owed": owed,
            "fell": [fall.sentence for fall in fell],
            "clean": seen.clean,
        }
    )
    for result in sorted(results, key=lambda result: result.right):
        console.line(result.sentence, status="ok" if result.right else "failed")
    for sentence in false:
        console.line(sentence, status="failed")
    for check, names in unkept.items():
        console.line(f"{check} claims {', '.join(names)} and does not kill it", status="failed")
    for name, owing in owed.items():
        told = "killed it once and did not now; forgotten.toml gives no reason"
        console.line(f"{name}: {', '.join(owing)} {told}", status="failed")
    for fall in fell:
        console.line(f"{fall.sentence}; forgotten.toml gives no reason", status="failed")
    right = sum(result.right for result in results)
    killed = sum(bool(result.killed_by) for result in results)
    told = f"{len(results)} faults: {killed} killed, {right} blamed rightly; {len(false)} false alarms"
    told += f" in {checks} checks and {len(drawn)} runs on clean engines"
    sound_matrix = right == len(results) and not (false or unkept or owed or fell)
    console.line(told, status="ok" if sound_matrix else "failed")
    return 0 if sound_matrix else 1


def _own(console: Console, folder: Path, jobs: int) -> int:
    """See the checks of a user's own suites kill what they claim, and keep it beside them.

    Exit code: 1 when a claim is not kept, or a check fails on the clean engine.
    """
    from prill_harness.decide.own import claimed as claims_of
    from prill_harness.faults.catalogue import named
    from prill_harness.faults.trial import kills as data
    from prill_harness.faults.trial import matrix
    from prill_harness.plan import beside
    from prill_harness.records.evidence import Cell
    from prill_harness.records.names import suite_of

    folder = folder.resolve()
    beside.examine(folder)
    claimed = claims_of(folder)
    names = dict.fromkeys(name for faults in claimed.values() for name in faults)
    subjects = [matrix.TrialSubject(named([name])) for name in names]
    cells: dict[Cell, None] = {}
    for subject in subjects:
        suites = sorted({suite_of(check) for check, faults in claimed.items() if subject.name in faults})
        cells |= {Cell(subject.model, matrix.ENGINE, suite): None for suite in suites}
        cells[Cell(subject.model, subject.engine, "+".join(suites))] = None
    records = _records(console, tuple(cells), jobs, "faults", folder)
    results = matrix.judge(subjects, records)
    alarms, _ = matrix.alarms(records)
    unkept = matrix.unkept(claimed, {result.subject.name: result.killed_by for result in results})
    trials = {result.subject.name: result.trial() for result in results}
    file = folder / data.FILE
    write_file(file, data.encode(data.Kills(trials, matrix.contents(records))))
    console.emit({"file": str(file), "unkept_claims": unkept, "alarms": [e.sentence for e in alarms],
                  "killed_by": {name: trial.killed_by for name, trial in trials.items()}})  # fmt: skip
    for check, faults in claimed.items():
        kept = [name for name in faults if check in trials[name].killed_by]
        console.line(
            f"{check} kills {len(kept)} of the {len(faults)} faults that it claims: {', '.join(faults)}"
        )
    for check, lost in unkept.items():
        console.line(f"{check} claims {', '.join(lost)} and does not kill it", status="failed")
    for e in alarms:
        console.line(f"{e.check} fails on the clean engine: {e.sentence}", status="failed")
    (console.remark if console.json else console.line)(f"written: {file}")
    return 1 if unkept or alarms else 0


def _selected(only: Sequence[str]) -> tuple[str, ...]:
    """Names of the faults selected by names and areas; all if nothing is given.

    Raises:
        UsageError: a name that is neither a fault nor an area.
        NothingSelected: an area without faults.
    """
    from prill_harness.faults.catalogue import catalogue
    from prill_harness.planting.faults import AREAS

    known = catalogue()
    for word in only:
        hint = "`prill faults list` shows both"
        look_up(word, [*known, *AREAS], "no such fault or area", hint=hint)
    chosen = tuple(name for name, f in known.items() if not only or name in only or f.area in only)
    if not chosen:
        raise NothingSelected("no fault is meant", got=" ".join(only))
    return chosen


def _trials(
    console: Console, subjects: Sequence[TrialSubject], jobs: int, gate: Gate | None = None
) -> tuple[tuple[TrialResult, ...], tuple[Record, ...]]:
    """Run the subjects and clean engines, and then the survivors against every suite.

    Args:
        gate: run its cells on clean engines too.
    """
    from prill_harness.faults.trial import matrix

    claimed = matrix.claims()
    records = _records(console, matrix.cells_for(subjects, claimed, gate=gate), jobs, "faults")
    results = matrix.judge(subjects, records)
    alive = [result.subject for result in results if not result.killed_by]
    if alive:
        every = _records(console, matrix.cells_for(alive, claimed, every=True), jobs, "survivors")
        records += every
        again = {result.subject: result for result in matrix.judge(alive, every)}
        results = tuple(again.get(result.subject, result) for result in results)
    return results, records


def _records(
    console: Console, cells: Sequence[Cell], jobs: int, what: str, suites: Path | None = None
) -> tuple[Record, ...]:
    """Run the cells in a temporary folder; their records."""
    from prill_harness.faults.trial import matrix

    with console.progress(len(cells), what) as bar, tempfile.TemporaryDirectory() as folder:
        return matrix.run(cells, Path(folder), jobs, runs.teller(bar), suites)


def _described(result: TrialResult) -> dict[str, object]:
    blamed = result.blamed
    return {
        "name": result.subject.name,
        "killed_by": result.killed_by,
        "blamed": blamed.parts if blamed else (),
        "because": {"check": blamed.check, "sentence": blamed.sentence} if blamed else None,
        "blames": sorted(result.subject.blames),
        "right": result.right,
        "sentence": result.sentence,
    }
