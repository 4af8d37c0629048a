"""The account of a run on hardware: a short page in Markdown, with goals met and missed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prill_harness.records.evidence import badness

# Goals of one H200 by model: tokens/s over 128 tokens after a prompt of 512, and seconds to open.
GOALS: dict[str, dict[str, float]] = {
    "synth:llama-1b:q8_0": {"decode": 1500, "prompt": 47_500},
    "synth:llama-1b:f16": {"decode": 1190},
    "synth:llama-8b:q8_0": {"decode": 380, "prompt": 16_000, "open": 10},
    "synth:llama-8b:q4_k": {"decode": 411, "prompt": 16_000},
}
LISTED = 20  # results of one step in the account, bad ones first


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one part of a step: "passed", "failed", "error", "timeout", "inconclusive", "missing"."""

    step: str
    name: str
    status: str
    sentence: str
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)


def worst(statuses: Iterable[str]) -> str:
    """The worst status of a set of results; "inconclusive" if there are none."""
    return min(statuses, key=badness, default="inconclusive")


def against_goals(model: str, rows: Mapping[str, float]) -> list[tuple[str, float, float, bool]]:
    """(figure, measured, goal, reached) for every goal of a model; a missing figure is nan, not reached."""
    judged = []
    for name, goal in GOALS.get(model, {}).items():
        value = rows.get(name, float("nan"))
        judged.append((name, value, goal, value <= goal if name == "open" else value >= goal))
    return judged


def told(name: str, value: float, goal: float, reached: bool) -> str:
    """`decode 1,234 of 1,500 tokens/s, missed by 18 %`."""
    unit = "s" if name == "open" else "tokens/s"
    if value != value:
        return f"{name} not measured, goal {goal:,.0f} {unit}"
    gap = abs(value / goal - 1)
    return f"{name} {shown(value)} of {goal:,.0f} {unit}, {'reached' if reached else f'missed by {gap:.0%}'}"


def shown(value: float) -> str:
    """Four digits; large numbers whole, with commas."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def account(title: str, results: Sequence[Result], command: str) -> str:
    """The whole page: machine, steps, speed, what went wrong, and how to reproduce it."""
    steps = list(dict.fromkeys(result.step for result in results))
    lines = [f"# {title}", ""]
    lines += ["| machine | |", "|---|---|"]
    lines += [f"| {r.name} | {_cell(r.sentence)} |" for r in results if r.step == "machine"]
    lines += ["", "## Steps", "", "| step | status | results | seconds |", "|---|---|---|---|"]
    for step in steps:
        mine = [r for r in results if r.step == step]
        counts = ", ".join(f"{n} {status}" for status, n in Counter(r.status for r in mine).most_common())
        took = sum(r.seconds for r in mine)
        lines.append(f"| {step} | {worst(r.status for r in mine)} | {counts} | {took:,.0f} |")
    timed = [r for r in results if r.step == "bench" and r.figures]
    if timed:
        lines += ["", "## Speed", "", *_speed(timed)]
    for step in steps:
        if step == "machine":
            continue
        mine = sorted((r for r in results if r.step == step), key=lambda r: badness(r.status))
        lines += ["", f"## {step}", ""]
        lines += [f"- {r.status}: {r.name}: {_cell(r.sentence)}" for r in mine[:LISTED]]
        if len(mine) > LISTED:
            lines.append(f"- … and {len(mine) - LISTED} more, all in `results.jsonl`")
    lines += ["", "## Again", "", "```", command, "```", ""]
    return "\n".join(lines)


def _speed(timed: Sequence[Result]) -> list[str]:
    """A table of medians and spreads, followed by every goal."""
    columns = ("copy", "open", "init", "module load", "upload and repack", "capture")
    columns += ("first token, cold", "first token", "prompt", "decode")
    lines = ["| engine, model | " + " | ".join(columns) + " | of copy |", "|---" * (len(columns) + 2) + "|"]
    for result in timed:
        samples = result.figures.get("rows", {})
        cells = [_sample(samples.get(name)) for name in columns]
        share = result.figures.get("share")
        cells.append("not measured" if share is None else f"{share:.0%}")
        lines.append(f"| {result.name} | " + " | ".join(cells) + " |")
    lines.append("")
    for result in timed:
        lines += [f"- {result.name}: {sentence}" for sentence in result.figures.get("goals", ())]
    return lines


def _sample(sample: Mapping[str, Any] | None) -> str:
    """`1,512 (1,498 to 1,520) tokens/s`."""
    if not sample:
        return "not reported"
    factor, unit = (1e-9, "GB/s") if sample["unit"] == "B/s" else (1.0, sample["unit"])
    median, low, high = (sample[key] * factor for key in ("median", "low", "high"))
    spread = f" ({shown(low)} to {shown(high)})" if sample["runs"] > 1 else ""
    return f"{shown(median)}{spread} {unit}"


def _cell(text: str) -> str:
    """One line that cannot break a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")
