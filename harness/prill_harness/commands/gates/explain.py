"""`prill explain`: what a check sees, what its failure usually means, and how to see it fail."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console

SHOWN = 8  # mistakes shown on a terminal


def complete(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """The checks whose ids begin with `begun`."""
    from prill_harness.records.catalog import check_ids

    return [CompletionItem(name) for name in sorted(check_ids()) if name.startswith(begun)]


@declare(name="explain", example="prill explain stages.early\nprill explain tokens.greedy --json")
@click.argument("check", shell_complete=complete)
def command(console: Console, check: str) -> int:
    """Say what CHECK observes, which mistakes it is known to find, and what its failure usually means."""
    from prill_harness.decide.explained import explain
    from prill_harness.engines.spec import FAULT
    from prill_harness.run import reproduce

    found = explain(check)
    run, planted = reproduce.line("run", found.check), ""
    for first in found.mistakes[:1]:
        run = reproduce.line("run", found.check, engine=first.engine, model=first.model)
        broken = f"{first.engine}{FAULT}{first.fault}"
        planted = reproduce.line("run", found.check, engine=broken, model=first.model)
    console.emit({"explanation": found, "reproduce": run, "see_it_fail": planted})
    console.line(f"{found.check}, {found.file}:{found.line}")
    console.line(f"observes: {found.observes}")
    for proven in found.proves:
        only = f", of models {proven.models}" if proven.models else ""
        console.line(f"proves {proven.item} ({proven.severity}{only}): {proven.title}; because {proven.why}")
        if proven.docs:
            console.line(f"  see {proven.docs}")
    if not found.proves:
        console.line("proves no item of a checklist")
    if found.mistakes:
        count = len(found.mistakes)
        told = "1 planted mistake" if count == 1 else f"{count} planted mistakes"
        console.line(f"finds {told}; a failure usually means one of these, or one like it:")
        console.table(
            ("mistake", "breaks", "what is wrong"),
            [(m.fault, ", ".join(m.where[:4]), m.summary) for m in found.mistakes[:SHOWN]],
        )
        if len(found.mistakes) > SHOWN:
            console.line(f"... and {len(found.mistakes) - SHOWN} more; --json shows them")
    else:
        console.line("was not seen to find a planted mistake: a pass of it proves nothing")
    console.line(f"run it alone: {run}")
    if planted:
        console.line(f"see it fail: {planted}")
    return 0
