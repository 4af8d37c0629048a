"""`prill judged`: judge the engines of others that a file declares, and write their table into a page."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import importlib.util
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from prill_harness.commands.shared import door, goldens, runs
from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console
from prill_harness.plan.given import named
from prill_harness.plan.plan import Plan, openers
from prill_harness.records.evidence import Cell, Evidence, Status
from prill_harness.records.files import write_file
from prill_harness.records.names import look_up, suite_of
from prill_harness.records.strict import load_toml
from prill_harness.run import executor, reproduce
from prill_runtime.errors import NothingSelected, UsageError

SUITES = ("contract", "tokens")
BEGIN, END = "<!-- judged: from here -->\n", "<!-- judged: to here -->\n"
HEAD = (
    "| engine | version | by | model | passed | failed | inconclusive | on |\n"
    "|---|---|---|---|---|---|---|---|\n"
)
KEPT = " (not installed since)"
PLACE = re.compile(r"@package:([\w.]+)@")


class Deviation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the engine is known to do otherwise, and a command that shows it."""

    what: str
    reproduce: str


class Declared(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine to judge.

    Attributes:
        package: the distribution whose version is told. spec: @python@ stands for this interpreter,
            @bin@ for the folder of its commands, @package:MODULE@ for the folder of an installed module.
    """

    name: str
    package: str
    spec: str
    models: tuple[str, ...]
    deviations: tuple[Deviation, ...] = ()

    @property
    def version(self) -> str | None:
        """The installed version; None if it is not installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    @property
    def here(self) -> str:
        """The spec on this machine."""

        def folder(found: re.Match[str]) -> str:
            spec = importlib.util.find_spec(found[1])
            if spec is None or not spec.submodule_search_locations:
                raise UsageError("no such module", where=self.name, got=repr(found[1]))
            return next(iter(spec.submodule_search_locations))

        commands = str(Path(sys.executable).parent)
        return PLACE.sub(folder, self.spec).replace("@python@", sys.executable).replace("@bin@", commands)

    @property
    def shown(self) -> str:
        """The spec as a page shows it, without a path of this machine."""
        return PLACE.sub("FOLDER", self.spec).replace("@python@", "python").replace("@bin@/", "")


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    engines: tuple[Declared, ...]


@declare(name="judged", example="prill judged\nprill judged --only llama.cpp --check")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), default=Path("docs/engines.toml"))
@click.option("--page", type=click.Path(path_type=Path, dir_okay=False), default=Path("docs/ENGINES.md"),
              show_default=True)  # fmt: skip
@click.option("--only", multiple=True, metavar="NAME", help="These engines alone; repeatable.")
@click.option("--check", is_flag=True, help="Write nothing: fail when the page says something else.")
@click.option("-j", "--jobs", type=click.IntRange(min=0), default=0, help="Cells at a time; 0: one per core.")
def command(console: Console, file: Path, page: Path, only: Sequence[str], check: bool, jobs: int) -> int:
    """Judge every installed engine that FILE declares (docs/engines.toml), and write the table of the page.

    An engine that is not installed keeps its last row, which says so. With --check, exit code 1 when the page
    is another.
    """
    declared = load_toml(file, _File).engines
    for name in only:
        look_up(name, [each.name for each in declared], "no such engine", where=str(file))
    before, region, after = _parts(page)
    found: dict[str, list[str]] = {}
    for each in declared:
        if each.version is not None and (not only or each.name in only):
            found[each.name] = _judge(console, each, jobs)
    if not found:
        raise NothingSelected("none of the engines is installed", where=str(file))
    kept = {each.name: _last(region, each.name, "" if each.version else KEPT) for each in declared}
    lines = [found.get(each.name) or kept[each.name] for each in declared]
    rows = [line for block in lines for line in block if line.startswith("|")]
    notes = [line for block in lines for line in block if not line.startswith("|")]
    table = HEAD + "".join(f"{line}\n" for line in rows) + "\n" + "".join(f"{line}\n" for line in notes)
    stale = [name for name, block in found.items() if _undated(block) != _undated(_last(region, name, ""))]
    console.emit({"page": str(page), "judged": sorted(found), "changed": stale, "rows": rows, "found": notes})
    for line in (*rows, *notes):
        console.line(line)
    if check:
        for name in stale:
            console.line(f"{page} says something else of {name}; run prill judged", status="failed")
        return 1 if stale else 0
    write_file(page, before + BEGIN + table + END + after)
    (console.remark if console.json else console.line)(f"written: {page}")
    return 0


def _parts(page: Path) -> tuple[str, str, str]:
    """What stands before, between and behind the marks of a page.

    Raises:
        UsageError: a page without both marks, once each and in their order.
    """
    text = page.read_text("utf-8")
    before, begin, rest = text.partition(BEGIN)
    region, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after or END in after:
        expected = f"{BEGIN.strip()} and {END.strip()}, once each"
        raise UsageError("the page does not say where its table stands", where=str(page), expected=expected)
    return before, region, after


def _judge(console: Console, engine: Declared, jobs: int) -> list[str]:
    """The rows and findings of one engine."""
    spec, called = engine.here, named(engine.models)
    door.examine((spec,), engine.models)
    cells = tuple(Cell(model, spec, suite) for model in called.values() for suite in SUITES)
    plan = Plan("judged", cells, given=openers(called))
    goldens.prepare(cells, plan.given, None)
    with console.progress(len(cells), engine.name) as bar, tempfile.TemporaryDirectory() as folder:
        seen = runs.outcome(plan, executor.run(plan, Path(folder), jobs, progress=runs.teller(bar)))
    today, connector = dt.datetime.now(dt.UTC).date(), engine.spec.partition(":")[0]
    lines, notes = [], []
    for model in called.values():
        mine = [e for e in seen.evidence if e.cell.model == model]
        count = Counter(e.status for e in mine)
        bad = [e for e in mine if e.status in (Status.FAILED, Status.ERROR)]
        cell = (engine.name, engine.version, connector, model, count[Status.PASSED], len(bad),
                count[Status.INCONCLUSIVE], today)  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cell))} |")
        for suite in dict.fromkeys(suite_of(e.base) for e in bad):
            checks = sorted({e.base for e in bad if suite_of(e.base) == suite})
            again = reproduce.line("run", *checks, engine=engine.shown, model=model)
            notes.append(f"- **{engine.name}** fails {', '.join(checks)}{_why(bad, suite)}: `{again}`")
    notes += [f"- **{engine.name}**: {each.what}: `{each.reproduce}`" for each in engine.deviations]
    notes += [f"- **{engine.name}** left no evidence in {' '.join(lost)}" for lost in seen.lost]
    return lines + notes


def _why(bad: Sequence[Evidence], suite: str) -> str:
    """The mistake by which failures of a suite are explained, as a clause; empty if none is."""
    told = [clause for e in bad if suite_of(e.base) == suite for clause in e.detail.get("explained", ())]
    return f", explained by {', or '.join(dict.fromkeys(told))}" if told else ""


def _last(region: str, name: str, mark: str) -> list[str]:
    """What the page says of an engine, its rows with this mark and no other."""
    mine = [line for line in region.splitlines() if line.startswith((f"| {name} |", f"- **{name}**"))]
    plain = [line.replace(KEPT, "") for line in mine]
    return [f"{line.removesuffix(' |')}{mark} |" if line.startswith("|") else line for line in plain]


def _undated(block: Sequence[str]) -> list[str]:
    """The lines of an engine without the day."""
    return [line.rpartition(" | ")[0] if line.startswith("|") else line for line in block]
