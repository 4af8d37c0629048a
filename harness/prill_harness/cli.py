"""The command line: run one command, and turn errors into one sentence and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from prill_harness.commands import engines, fleet, gates, incidents, ledgers
from prill_harness.commands.shared.declare import COMPLETE, DEBUG, debug_option
from prill_harness.console import printable, write
from prill_harness.version import commit, version
from prill_runtime.errors import PrillError, UsageError

COMMANDS = {
    "gate": gates, "plan": fleet, "merge": fleet, "run": gates, "new": gates,
    "golden": engines, "requests": gates, "bisect": engines, "trace": engines, "judged": engines,
    "checklist": gates, "faults": gates, "leak": engines, "vram": engines, "report": gates, "badge": ledgers,
    "show": ledgers, "diff": ledgers, "incident": incidents, "waive": incidents,
    "bench": engines, "generate": engines, "inspect": engines, "explain": gates, "doctor": gates,
    "completion": gates,
}  # fmt: skip
"""Command -> the room of its module, in the order of the help."""
INTERRUPTED = 2
BROKEN_PIPE = 141  # what a shell reports for a writer whose reader is gone: 128 + SIGPIPE


class Cli(click.Group):
    """Loads a command's module when it is called, and turns errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"{COMMANDS[cmd_name].__name__}.{cmd_name}").command
        return command

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run one command line and exit: 0 pass, 1 gate failed, 2 interrupted, 3 internal, 4 usage, 5, 10."""
        self._main_shell_completion({}, "prill", COMPLETE)  # answers a shell's completion request, and exits
        sys.exit(self._run(list(sys.argv[1:] if args is None else args)))

    def _run(self, args: list[str]) -> int:
        debug = False
        try:
            with self.make_context("prill", args) as ctx:
                try:
                    self.invoke(ctx)
                finally:
                    debug = bool(ctx.meta.get(DEBUG))
            return 0
        except click.exceptions.Exit as end:
            return end.exit_code
        except click.exceptions.NoArgsIsHelpError as asked:
            write(sys.stdout, f"{asked.ctx.get_help() if asked.ctx else ''}\n")
            return 0
        except (KeyboardInterrupt, click.Abort):
            return _fail("interrupted: what was written so far is kept", INTERRUPTED, debug)
        except BrokenPipeError:
            write(sys.stdout, "")
            return BROKEN_PIPE
        except click.ClickException as error:
            return _fail(_usage_sentence(error), UsageError.exit_code, debug)
        except PrillError as error:
            return _fail(str(error), error.exit_code, debug)
        except OSError as error:
            if error.filename is None:
                return _fail(_internal(error), PrillError.exit_code, debug)
            return _fail(f"usage error in {error.filename}: {error.strerror}", UsageError.exit_code, debug)
        except RecursionError:
            return _fail("usage error: an input is nested too deeply to be read", 4, debug)
        except Exception as error:
            return _fail(_internal(error), PrillError.exit_code, debug)


def _fail(sentence: str, code: int, debug: bool) -> int:
    if debug:
        write(sys.stderr, traceback.format_exc())
    with contextlib.suppress(PrillError):  # there is nowhere to report it
        write(sys.stderr, printable(sentence) + "\n")
    return code


def _internal(error: BaseException) -> str:
    return f"internal error: {type(error).__name__}: {error}; --debug shows the traceback"


def _usage_sentence(error: click.ClickException) -> str:
    """Click's message as one sentence that names the command and where its help is."""
    path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "prill"
    message = " ".join(error.format_message().split()).rstrip(".")
    return f"usage error in {path}: {message[:1].lower()}{message[1:]}; see {path} --help"


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _say_version(ctx: click.Context, option: click.Parameter, asked: bool) -> None:
    if asked:
        write(sys.stdout, f"prill {version()}, commit {commit()}\n")
        ctx.exit()


@click.group(cls=Cli, name="prill", epilog="\b\nExample:\n  prill gate -j 2")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_say_version,
    help="Version and commit.",
)
@debug_option
def cli() -> None:
    """Tell whether an LLM inference engine is right, and whether the merge may go through.

    Exit codes: 0 pass, 1 the gate failed, 2 interrupted, 3 internal error, 4 usage or an invalid policy,
    waiver or model file, 5 nothing selected, 10 inconclusive.
    """


def main() -> None:
    """Entry point of the `prill` script; SIGTERM ends a run like Ctrl-C."""
    signal.signal(signal.SIGTERM, _terminated)
    _open_streams()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # what they warn of is checked, and reported in a sentence
    try:
        Path.cwd()
    except OSError:
        sys.exit(_fail("usage error: the current folder is gone; change to one that exists", 4, False))
    cli.main()


def _open_streams() -> None:
    """Open closed standard streams on /dev/null: the next file opened would otherwise take their number."""
    for number, flags in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest free descriptor: this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
