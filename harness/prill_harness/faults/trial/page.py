"""Render the kill matrix as docs/FAULTS.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prill_harness.faults.trial.kills import FaultTrial, Kills
from prill_harness.planting.faults import AREAS

SHOWN_CHECKS = 6  # checks listed for a fault; the table of checks has them all
INTRO = """\
# Planted faults

A planted fault is a small bug with a name, kept outside the code it breaks. Open an engine as
`numpy+fault:NAME` and it has that bug; several compose. A check that never failed proves nothing, so every
check names faults it finds, and `prill faults matrix` plants them all and looks:

- a **kill** is a check that fails on the faulty engine by its own judgement and passes on the sound one with
  the same model. A crash is no kill. An engine that refuses the model is killed by the `file` suite alone.
- **blamed** is what the evidence points at, in the order in which data walks: file, blocks, tokenizer, the
  first wrong stage, sampler, memory, state, generation. It has to be what the fault breaks.
- a fault of the **harness** is killed when a check fails too, or passes and saw less than nine tenths of what
  it saw without the fault, or, where none does, when checks that passed before say that they saw nothing.

A gate counts a pass only from a check that killed every fault it claims, with the code the check has now.
What was seen once is **owed**: a kill, and the amount that a check compares on the clean engine. A matrix
that shows less exits with 1 and keeps the debt, until a line of `prill_fixtures/forgotten.toml` gives the
reason.
This page is written by the command itself:

```
prill faults matrix -j 2 -o suites/prill_suites/kills.json --docs docs/FAULTS.md
```
"""


def render(kills: Kills) -> str:
    """The page: figures, a table per area, and the kills of each check."""
    trials = kills.faults
    killed = sum(bool(trial.killed_by) for trial in trials.values())
    right = sum(trial.right for trial in trials.values())
    clean = kills.clean
    amounts = sum(map(len, kills.observed.values()))
    text = [
        INTRO,
        f"{len(trials)} faults: {killed} killed, {right} of them blamed rightly.",
        f"{clean.runs} clean runs on text of their own: {clean.alarms} alarms. "
        f"{clean.checks} checks on clean engines: {clean.suite_alarms} alarms.",
        f"{amounts} amounts of values are on record, in {len(kills.observed)} cells.",
        *(f"**`{name}` is owed** by {_code(checks)}." for name, checks in sorted(kills.owed.items())),
    ]
    for area in AREAS:
        rows = {name: trial for name, trial in sorted(trials.items()) if trial.area == area}
        if rows:
            text += [f"\n## {area.capitalize()}\n", _faults(rows)]
    text += ["\n## Checks\n", _checks(kills), "\n## Clean runs\n", _clean(kills.clean.worst)]
    return "\n".join(text) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _few(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_CHECKS
    return _code(names[:SHOWN_CHECKS]) + (f" and {more} more" if more > 0 else "")


def _faults(rows: Mapping[str, FaultTrial]) -> str:
    return _table(
        ("fault", "what is wrong", "killed by", "blamed"),
        [
            (f"`{name}`", trial.summary, _few(trial.killed_by) or "**survives**", _blamed(trial))
            for name, trial in rows.items()
        ],
    )  # fmt: skip


def _blamed(trial: FaultTrial) -> str:
    wrongly = bool(trial.killed_by) and not trial.right
    return (_code(trial.blamed) or "nothing") + " **wrongly**" * wrongly


def _checks(kills: Kills) -> str:
    rows = [(f"`{check}`", _code(kills.killed_by(check)) or "**nothing**") for check in sorted(kills.checks)]
    return _table(("check", "kills"), rows)


def _clean(worst: Mapping[str, float]) -> str:
    rows = [(f"`{model}`", f"{ratio:.2g}") for model, ratio in sorted(worst.items())]
    return "The largest figure over its bound, where 1 is an alarm:\n\n" + _table(("model", "ratio"), rows)
