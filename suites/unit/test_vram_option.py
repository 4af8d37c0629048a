"""--vram-budget: every command that opens engines takes it, and it holds before anything is allocated."""

from __future__ import annotations

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_harness import cli
from prill_harness.engines.spec import EngineSpec, with_budget
from prill_runtime.device.model import Options
from prill_runtime.errors import UsageError

from .commandline import child

TAKING = ("bench", "bisect", "gate", "generate", "golden compare", "leak", "run", "trace", "vram")


def options_of(words: str) -> set[str]:
    """The long options of a command."""
    found: click.Command = cli.cli
    context = click.Context(found)
    for word in words.split():
        assert isinstance(found, click.Group)
        found = found.get_command(context, word)  # type: ignore[assignment]
    return {name for parameter in found.params for name in parameter.opts}


@pytest.mark.parametrize("words", TAKING)
def test_every_command_that_opens_engines_takes_it(words: str) -> None:
    """Wherever there is --engine there is --vram-budget."""
    assert {"--engine", "--vram-budget"} <= options_of(words)


def generated(*more: str) -> tuple[int, str, str]:
    words = ["--model", "fixture:llama-tiny", "--prompt", "The", "--max-tokens", "2", *more]
    done = child("generate", *words)
    return done.returncode, done.stdout, done.stderr


def test_a_model_that_does_not_fit_is_refused_with_its_needs() -> None:
    """Needed, available, device and model stand in one sentence; a budget that is enough changes nothing."""
    code, text, said = generated("--engine", "emu", "--vram-budget", "2MiB")
    assert (code, text) == (1, "")
    assert said.count("\n") == 1
    for part in ("llama-tiny", "on emu", "at most 2.0 MiB, the budget", "MiB needed (weights 5.5 MiB"):
        assert part in said
    enough, free = generated("--engine", "emu", "--vram-budget", "1GiB"), generated("--engine", "emu")
    assert enough[:2] == free[:2]
    assert enough[0] == 0


def test_what_cannot_be_limited_is_said() -> None:
    """An engine without device memory, a size that is none, a budget given twice: exit 4, one sentence."""
    for engine, size, said in (
        ("numpy", "2GiB", "no engine has device memory"),
        ("emu", "2GB", "not a size"),
        ("emu:budget=1GiB", "2GiB", "bad engine argument"),
    ):
        code, text, error = generated("--engine", engine, "--vram-budget", size)
        assert (code, text) == (4, "")
        assert said in error
        assert error.count("\n") == 1


@given(
    st.sampled_from(
        ["cuda", "cuda:1", "emu:fast", "cuda:0,fast,cache=4096", "emu+fault:x", "cuda:fast+fault:x+fault:y"]
    ),
    st.lists(st.sampled_from(["numpy", "numpy64", "numpy+fault:x"]), max_size=2),
    st.sampled_from(["2GiB", "500MiB", "1000"]),
)
def test_the_budget_joins_the_argument_and_nothing_else(spec: str, others: list[str], size: str) -> None:
    """Ordinal, arithmetic, cache and faults stay; engines that have no device memory stay as they are."""
    *same, limited = with_budget([*others, spec], size)
    assert same == others
    before, after = EngineSpec.parse(spec), EngineSpec.parse(limited)
    assert (after.name, after.faults) == (before.name, before.faults)
    was, now = Options.parse(before.name, before.argument), Options.parse(after.name, after.argument)
    assert was.budget is None
    assert now.budget == {"2GiB": 2 << 30, "500MiB": 500 << 20, "1000": 1000}[size]
    assert (now.device, now.mode, now.positions) == (was.device, was.mode, was.positions)


def test_no_engine_at_all_is_an_error() -> None:
    """The gate's plan may name none."""
    with pytest.raises(UsageError, match="got none"):
        with_budget([], "2GiB")
