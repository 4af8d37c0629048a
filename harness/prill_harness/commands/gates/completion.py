"""`prill completion`: the script for completion in a shell."""

from __future__ import annotations

import sys

import click
from click.shell_completion import get_completion_class

from prill_harness.commands.shared.declare import COMPLETE
from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console, write


@declare(
    name="completion",
    example="prill completion bash\nprill completion fish",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(console: Console, shell: str) -> int:
    """Print the script that makes SHELL complete commands, options, suites and checks.

    For bash and zsh, put `eval "$(prill completion bash)"`, or zsh, into the shell's start-up file; for fish,
    write it to ~/.config/fish/completions/prill.fish.
    """
    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    root = click.get_current_context().find_root().command
    script = kind(root, {}, "prill", COMPLETE)
    text = script.source_template % script.source_vars()
    console.emit({"shell": shell, "script": text})
    if not console.json:
        write(sys.stdout, text)
    return 0
