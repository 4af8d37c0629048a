"""`prill faults matrix --engine`: see which checks find what is put before an engine of anybody's."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from prill_harness.commands.shared import runs
from prill_harness.console import Console
from prill_harness.plan.beside import check_ids, suites
from prill_harness.plan.plan import Plan
from prill_harness.records.files import write_file
from prill_harness.records.names import look_up, suite_of
from prill_runtime.errors import NothingSelected


def matrix(
    console: Console,
    spec: str,
    models: Sequence[str],
    wanted: Sequence[str],
    only: Sequence[str],
    output: Path | None,
    jobs: int,
) -> int:
    """Put every fault of `faults.blackbox` before the engine, and keep what its checks found.

    Args:
        models: the first that has what a fault changes is taken. wanted: suites; empty for the usual ones.

    Returns:
        Exit code: 1 when a fault is not seen, or is blamed on another part.
    """
    from prill_harness.faults.blackbox.planted import BLACKBOX
    from prill_harness.faults.trial import connector
    from prill_harness.faults.trial.matrix import TIMEOUT_S
    from prill_harness.plan.policy import load_policy
    from prill_harness.run import executor

    for name in only:
        look_up(name, BLACKBOX, "no such fault for any engine")
    policy = load_policy(None)
    for suite in wanted:
        look_up(suite, suites(policy.folder), "no such suite")
    models = models or [m for entry in policy.gate("contract").plan for m in entry.models]
    trials = connector.trials(spec, models, wanted or connector.SUITES, only)
    if not trials:
        raise NothingSelected("no fault can be put before this engine", got=" ".join(only))
    cells = connector.cells(trials)
    asked = {suite for trial in trials for suite in trial.suites}
    checks = [
        c for c in check_ids(policy.folder) if suite_of(c) in asked and not c.startswith(connector.SIGHT)
    ]
    with console.progress(len(cells), "faults") as bar, tempfile.TemporaryDirectory() as folder:
        plan = Plan("faults", cells, tuple(checks), policy.folder)
        records = executor.run(plan, Path(folder), jobs, progress=runs.teller(bar), timeout_s=TIMEOUT_S)
    found = connector.judge(trials, records)
    sight = connector.recorded(spec, found, records)
    file = connector.keep(spec, sight)
    if output:
        write_file(output, msgspec.json.format(msgspec.json.encode(sight, order="sorted"), indent=1).decode())
    console.emit(
        {
            "engine": sight.engine,
            "faults": [
                {"name": f.trial.fault.name, "model": f.trial.model, "killed_by": f.killed_by,
                 "blamed": f.blamed, "right": f.right, "unsaid": f.unsaid, "sentence": f.sentence}
                for f in found
            ],
        }
    )  # fmt: skip
    for each in sorted(found, key=lambda each: each.right):
        status = "ok" if each.right else "inconclusive" if each.unsaid else "failed"
        console.line(each.sentence, status=status)
    seen = sorted({check for each in found for check in each.killed_by})
    silent = sorted(set(sight.checks) - set(seen))
    right = sum(each.right for each in found)
    unsaid = sum(not each.right and bool(each.unsaid) for each in found)
    told = f"{len(found)} faults put before the engine: {right} found and blamed rightly, {unsaid} of which "
    told += f"nothing can be said; {len(seen)} checks were seen to kill"
    console.line(told, status="ok" if right + unsaid == len(found) else "failed")
    if silent:
        console.line(f"not seen to kill, so a gate does not count them: {', '.join(silent)}")
    (console.remark if console.json else console.line)(f"written: {file}")
    return 0 if right + unsaid == len(found) else 1
