"""`prill leak`: what an engine's paths leak, or the examination of the probe itself."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prill_harness.commands.shared.declare import SPECS, vram_option
from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console
from prill_harness.engines.spec import EngineSpec
from prill_harness.records.files import write_file
from prill_runtime.errors import UsageError

if TYPE_CHECKING:
    from prill_harness.leaks.reports.report import LeakReport, PathReport

PATHS = ("success", "error", "cancel", "load", "session", "concurrent", "requests")
ALLOCATION = "allocation"  # of an engine that prill starts by a command: each fails in turn
REPORTERS = "prill.leak_reporters"


@declare(
    name="leak",
    example="prill leak --engine numpy --model fixture:llama-tiny\n"
    "prill leak --engine numpy --model fixture:llama-tiny --path all --html leaks.html\n"
    "prill leak --engine 'exec:./engine {model}' --model fixture:llama-tiny --path allocation\n"
    "prill leak --selftest --quick",
    own="control:",
)
@click.option("--engine", default="numpy", show_default=True, metavar="SPEC", help=f"{SPECS}.")
@vram_option
@click.option("--model", metavar="SPEC", help="A path, or fixture:NAME[:TYPE].")
@click.option(
    "--calls",
    type=click.IntRange(min=50),
    default=50,
    show_default=True,
    help="Of each path, warm-up included.",
)
@click.option("--path", "path", type=click.Choice([*PATHS, ALLOCATION, "all"]), default="success",
              show_default=True)  # fmt: skip
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=300.0, show_default=True, help="Seconds for each path."
)
@click.option(
    "--pid",
    type=click.IntRange(min=1),
    metavar="PID",
    help="Of an http: server: the process to watch, with its children.",
)
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write the curves as a page.")
@click.option("--selftest", is_flag=True, help="Examine the probe itself on known leaks and clean engines.")
@click.option("--quick", is_flag=True, help="With --selftest: fewer of each, under a minute.")
@click.option("--device", is_flag=True, help="With --selftest: known leaks on the GPU too.")
@click.option(
    "--docs",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --selftest: write the page of its table.",
)
@click.option(
    "-j", "--jobs", type=click.IntRange(min=1), default=1, help="With --selftest: probes at a time."
)
def command(
    console: Console,
    engine: str,
    model: str | None,
    calls: int,
    path: str,
    timeout: float,
    pid: int | None,
    html: Path | None,
    selftest: bool,
    quick: bool,
    device: bool,
    docs: Path | None,
    jobs: int,
) -> int:
    """Tell whether an engine gives back the memory it takes: exact ledgers, 50 calls, three verdicts.

    An engine in another process (exec:, capi:, serve:, http: with --pid) is watched from outside: resident
    memory, threads and descriptors. With `--path allocation` the allocations of a request fail in turn in the
    process of exec: and serve:, which has to refuse the request and go on.

    Exit code 0 clean, 1 leak, 10 inconclusive.
    """
    if selftest:
        from prill_harness.leaks.selftest import selftest as examination

        return examination.command(console, quick=quick, device=device, docs=docs, jobs=jobs)
    if model is None:
        raise UsageError("no model to probe", where="prill leak", hint="name one with --model")
    from prill_harness.leaks.judge import starved, watched
    from prill_harness.leaks.judge.hosted import lost_settings
    from prill_harness.leaks.judge.live import Live
    from prill_harness.leaks.judge.probe import again, probe
    from prill_harness.leaks.reports.report import Probe

    engine = with_pid(engine, pid)
    wanted = Probe(engine, model, PATHS[0] if path == "all" else path, calls, timeout)
    if path == ALLOCATION:
        report = starved.probe(wanted, again(wanted, (path,)))
    elif watched.elsewhere(engine):
        names = tuple(watched.PATHS) if path == "all" else (path,)
        report = watched.probe(wanted, names, again(wanted, names if path != "all" else PATHS))
    else:
        for name in lost_settings():
            console.remark(f"{name} is not set where the engine is probed: it changes what is allocated")
        with Live() as live:
            report = probe(wanted, PATHS if path == "all" else (path,), live.watch)
    if html is not None:
        write_file(html, render("html", report))
    console.emit(report)
    show(console, report)
    return report.exit_code


def with_pid(engine: str, pid: int | None) -> str:
    """The spec of an http: engine with its process declared. Raises UsageError: another engine has one."""
    if pid is None:
        return engine
    if EngineSpec.parse(engine).name != "http":
        raise UsageError(
            "only a server's process has to be named", where="--pid", expected="http:", got=engine
        )
    return f"{engine},pid={pid}"


def show(console: Console, report: LeakReport) -> None:
    """Print a table of every series that moved, and one sentence per path."""
    console.table(
        ("status", "path", "ledger", "per call", "95 % interval", "windows", "in all"),
        [row for path in report.paths for row in _rows(path)],
        status=0,
    )
    console.line()
    for path in report.paths:
        console.line(f"{path.path}: {path.sentence}", status=path.verdict.status)
        for site in path.sites:
            console.line(
                f"  {site.bytes_per_call:.4g} B per call allocated in {site.function}, from "
                + " < ".join(site.stack[1:6])
            )
        if path.walk and path.verdict.value == "clean":
            console.line(f"  {path.walk.sentence}")
        if path.stacks:
            console.line(f"  {path.stacks}")
    console.line(
        f"{report.verdict.value}: {report.engine} on {report.model}, {report.duration_s:.1f} s",
        status=report.verdict.status,
    )


def _rows(path: PathReport) -> list[tuple[str, ...]]:
    rows = list[tuple[str, ...]]()
    for j in path.seen:
        moved = j.values[-1] - j.values[0] if j.values else 0
        if not j.values or (j.verdict.value == "clean" and not moved):
            continue
        interval = f"{j.low:.4g} to {j.high:.4g}"
        rows.append(
            (
                j.verdict.status, path.path, f"{j.ledger} {j.series}", f"{j.slope:.4g} {j.unit}",
                interval,
                f"{j.windows} of {j.of}", f"{moved:+d}",
            )
        )  # fmt: skip
    still = [f"{j.ledger} {j.series}" for j in path.seen if j.values and j.values[0] == j.values[-1]]
    if still:
        rows.append(("passed", path.path, f"{len(still)} more series", "0", "", "", "+0"))
    rows += [("inconclusive", path.path, name, "not attached", "", "", "") for name in path.missing]
    return rows


def render(name: str, report: LeakReport) -> str:
    """A report as a page, by the reporter of that name."""
    for point in entry_points(group=REPORTERS, name=name):
        text: str = point.load()(report)
        return text
    raise UsageError("no such leak reporter", got=repr(name), hint="install prill again")
