"""`prill bench`: time every phase of an engine, and hold it to a budget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from prill_harness.commands.engines import baseline as held
from prill_harness.commands.shared.declare import SPECS, vram_option
from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console
from prill_harness.measure.bench import BenchResult, Ratio, Row, Sample, Settings, Timed, measure, steps
from prill_runtime.errors import UsageError

WIDTH = 24  # characters of a full bar
FIRST = ("first token, cold", "first token")
SINGLE = ("copy", "prompt", "decode")


@declare(
    name="bench",
    example="prill bench --engine numpy --model synth:llama-micro:q8_0 --prompt 64 --tokens 32\n"
    "prill bench --engine numpy --model fixture:llama-tiny --against numpy64 --budget 1.10\n"
    "prill bench --engine numpy --model fixture:llama-tiny --prompt 64 --baseline speed.json --record",
)
@click.option("--engine", default="numpy", show_default=True, help=f"{SPECS}.")
@vram_option
@click.option("--model", required=True, help="Path, fixture:NAME[:TYPE] or synth:SHAPE:TYPE.")
@click.option("--against", metavar="ENGINE", help="Time this engine in turn, and say the ratios.")
@click.option("--budget", type=click.FloatRange(min=0, min_open=True), metavar="RATIO",
              help="Exit 1 if prompt or decoding takes over RATIO times as long; baseline: 1.1.")  # fmt: skip
@click.option("--baseline", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Hold the engine, by a calibration, to an earlier run on this machine.")  # fmt: skip
@click.option("--record", is_flag=True, help="Write that baseline.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="RESULT",
              help="Write the comparison for `prill gate --speed RESULT`.")  # fmt: skip
@click.option("--prompt", type=click.IntRange(min=1), default=512, show_default=True, help="Ids per prompt.")
@click.option("--tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Per answer.")
@click.option("--repeat", type=click.IntRange(min=1), help="Timed answers; default 5, with --baseline 20.")
@click.option("--loads", type=click.IntRange(min=1), default=1, show_default=True, help="Times it is opened.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the prompts.")
def command(
    console: Console,
    engine: str,
    model: str,
    against: str | None,
    budget: float | None,
    baseline: Path | None,
    record: bool,
    output: Path | None,
    prompt: int,
    tokens: int,
    repeat: int | None,
    loads: int,
    seed: int,
) -> int:
    """Time loading, first token, prompt and decoding; medians and spreads.

    Exit code 1 when a budget was not kept, 10 when noise hides whether it was; 4 for a baseline of another
    machine.
    """
    if baseline is None and (record or output):
        raise UsageError("nothing to compare with", where="prill bench", hint="name a file with --baseline")
    if baseline is not None:
        if against is not None:
            raise UsageError("one comparison at a time", expected="--against or --baseline", got="both")
        settings = Settings(prompt, tokens, repeat or 20, loads, seed)
        return held.run(
            console, engine, model, settings, file=baseline, record=record, budget=budget, output=output
        )
    if budget is not None and against is None:
        hint = "name an engine with --against, or a file with --baseline"
        raise UsageError("a budget needs something to hold against", hint=hint)
    specs = (engine,) if against is None else (engine, against)
    settings = Settings(prompt, tokens, repeat or 5, loads, seed)
    with console.progress(steps(settings, len(specs)), f"timing {model}") as bar:
        result = measure(model, specs, settings, tell=bar.step)
    over = [ratio for ratio in result.ratios if budget is not None and ratio.median > budget]
    console.emit({"result": result, "budget": budget, "over": [ratio.name for ratio in over]})
    show(console, result)
    for ratio in result.ratios:
        console.line(_told(ratio, result), status="failed" if ratio in over else "")
    if budget is not None:
        kept = f"over the budget of {budget:g}: {', '.join(r.name for r in over)}" if over else ""
        console.line(kept or f"within the budget of {budget:g}", status="failed" if over else "ok")
    return 1 if over else 0


def show(console: Console, result: BenchResult) -> None:
    """Print a line on the run, and a table with a bar for every figure."""
    console.line(
        f"{result.model}: prompt {result.prompt}, {result.tokens} tokens, "
        f"{result.weight_bytes / 1e6:,.1f} MB of weights per token, model sha256 {result.model_sha256[:16]}"
    )
    for timed in result.engines:
        console.line(f"{timed.engine}: {timed.name} {timed.version}, {timed.device}, {timed.arithmetic}")
    console.line()
    columns = ("what", "engine", "median", "lowest to highest", "runs", "of copy", "")
    console.table(columns, list(_rows(result)))
    console.line()


def _rows(result: BenchResult) -> Iterator[tuple[object, ...]]:
    names = dict.fromkeys(row.name for timed in result.engines for row in timed.rows)
    for name in names:
        for timed in result.engines:
            row = timed.row(name)
            if row.sample is None:
                yield name, timed.engine, "not reported", "", "", "", ""
                continue
            s = row.sample
            share = "" if row.share is None else f"{row.share:.0%}"
            spread = f"{figure(s.unit, s.low)} to {figure(s.unit, s.high)}" if s.runs > 1 else ""
            bar = _bar(row, result.engines)
            yield name, timed.engine, figure(s.unit, s.median), spread, s.runs, share, bar


def figure(unit: str, value: float) -> str:
    """A number with a readable unit."""
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
    if unit == "B/s":
        return f"{value / 1e9:,.1f} GB/s"
    return f"{value:,.1f} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def _bar(row: Row, engines: tuple[Timed, ...]) -> str:
    """A bar relative to the copy bandwidth for decoding, else to the largest figure of the group."""
    assert row.sample is not None
    if row.share is not None:
        return _drawn(row.share)
    rows = [other for timed in engines for other in timed.rows if _group(other.name) == _group(row.name)]
    samples: list[Sample] = [other.sample for other in rows if other.sample is not None]
    return _drawn(row.sample.median / max(s.median for s in samples)) if len(samples) > 1 else ""


def _group(name: str) -> str:
    """The group of a figure, which has one scale: all phases of loading; both first tokens."""
    return "first" if name in FIRST else name if name in SINGLE else "loading"


def _drawn(share: float) -> str:
    """A bar whose full length is WIDTH; more than that ends in a mark."""
    length = round(WIDTH * min(share, 1))
    return "█" * length + ("▶" if share > 1 else "")


def _told(ratio: Ratio, result: BenchResult) -> str:
    mine, other = (timed.engine for timed in result.engines)
    return (
        f"{ratio.name}: {mine} takes {ratio.median:.3f} times as long as {other} "
        f"({ratio.low:.3f} to {ratio.high:.3f} in {ratio.runs} pairs)"
    )
