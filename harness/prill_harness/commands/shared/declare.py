"""Declare click commands with --json, --debug and an example, and the options that several share."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from prill_harness.commands.shared import door
from prill_harness.console import Console

F = TypeVar("F", bound=Callable[..., Any])
DEBUG = "prill.debug"
SPECS = (
    "numpy, cuda, emu, hf, py:MODULE:CLASS, exec:COMMAND, capi:PATH.so, http://HOST:PORT, serve:COMMAND, "
    "llamacpp:FOLDER, recorded:FILE"
)
"""Engine specs, as --help tells them."""
COMPLETE = "_PRILL_COMPLETE"
"""The variable that a shell sets for completion, by click's protocol."""


def _remember_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[DEBUG] = True


def debug_option(function: F) -> F:
    """Add --debug, which prints the traceback of an error."""
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_remember_debug,
        help="Show the traceback of an error.",
    )(function)


def command(
    *,
    example: str,
    parent: click.Group | None = None,
    name: str | None = None,
    judges: bool = False,
    own: str = "",
) -> Callable[[Callable[..., int]], click.Command]:
    """Turn `function(console, **options) -> exit code` into a command; its help ends with the example.

    Args:
        judges: the command judges its engines, so that none of them may be the oracle.
        own: a prefix of engine specs that the command opens by itself.
    """

    def declare(function: Callable[..., int]) -> click.Command:
        @functools.wraps(function)
        def run(*, as_json: bool, quiet: bool, **options: Any) -> None:
            door.pass_through(options, judges=judges, own=own)
            context = click.get_current_context()
            _, _, words = context.command_path.partition(" ")
            context.exit(function(Console(json=as_json, command=words, quiet=quiet), **options))

        option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
        silent = click.option("--quiet", is_flag=True, help="Show no progress.")
        decorated = debug_option(option(silent(run)))
        epilog = "\b\nExample:\n" + "\n".join(f"  {line}" for line in example.splitlines())
        made = click.command(name=name or function.__name__, epilog=epilog)(decorated)
        if parent is not None:
            parent.add_command(made)
        return made

    return declare


class Part(click.ParamType[tuple[int, int]]):
    """`i/n`: part i of n, counted from 1."""

    name = "I/N"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        index, slash, count = str(value).partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            self.fail(f"{value!r} is not of the form 1/4", param, ctx)
        return int(index), int(count)


def _several(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


def vram_option(function: F) -> F:
    """Add --vram-budget, which becomes part of the spec of every engine on a device."""

    @functools.wraps(function)
    def run(*arguments: Any, vram_budget: str | None, **options: Any) -> int:
        if vram_budget is not None:
            from prill_harness.engines.spec import with_budget

            given = {name: _several(options[name]) for name in door.ENGINES if options.get(name)}
            limited = iter(with_budget([spec for specs in given.values() for spec in specs], vram_budget))
            for name, specs in given.items():
                own = [next(limited) for _ in specs]
                options[name] = own[0] if isinstance(options[name], str) else own
        return int(function(*arguments, **options))

    return click.option(
        "--vram-budget",
        metavar="SIZE",
        help="Most device memory that an engine on a device may take, such as 2GiB.",
    )(run)  # type: ignore[return-value]


def second_option(function: F) -> F:
    """Add --second, a further reading of the model that judges the oracle in the suite `witness`."""

    @functools.wraps(function)
    def run(*arguments: Any, second: str | None, **options: Any) -> int:
        from prill_harness.witness.second import ask

        if second is not None:
            ask(second)
        return int(function(*arguments, **options))

    return click.option(
        "--second",
        metavar="hf",
        help="Have transformers, too, judge the oracle on the model (suite witness).",
    )(run)  # type: ignore[return-value]


def cell_timeout_option(function: F) -> F:
    """Add --cell-timeout: the seconds that one cell may take."""
    return click.option(
        "--cell-timeout",
        "cell_timeout",
        type=click.FloatRange(min=1),
        metavar="SECONDS",
        help="Most seconds for one cell; default: twenty times what it took before, never under two minutes.",
    )(function)


def quoted(text: str) -> str:
    """Text as a JSON string: one line, every control character escaped, letters kept."""
    return json.dumps(text, ensure_ascii=False)
