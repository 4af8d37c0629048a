"""Every command that prill prints for running something again runs that very thing, by prill's own parser."""

from __future__ import annotations

import ast
import os
import shlex
from itertools import product
from pathlib import Path
from unittest.mock import patch

import click
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prill_harness
from prill_harness.cli import cli
from prill_harness.commands.gates import run as run_command
from prill_harness.leaks.judge.probe import again
from prill_harness.leaks.probed import paths
from prill_harness.leaks.reports.report import Probe
from prill_harness.plan.plan import Plan
from prill_harness.records.catalog import check_ids, suites
from prill_harness.records.evidence import Cell, Evidence
from prill_harness.run import executor, reproduce
from prill_harness.witness.second import SECOND_VARIABLE

DEVICES = st.sampled_from(["cpu", "cuda"]) | st.integers(0, 15).map("cuda:{}".format)
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
CHECKS = st.builds("{}{}".format, st.sampled_from(sorted(check_ids())), st.sampled_from(["", "[q8_0]"]))


def parsed(command: str) -> dict[str, object]:
    """The options of a printed command line, as the command line of prill reads them."""
    prill, name, *words = shlex.split(command)
    assert prill == "prill"
    command_of = cli.get_command(click.Context(cli), name)
    assert command_of is not None, name
    return command_of.make_context(name, words).params


def cells_of(command: str) -> tuple[set[Cell], tuple[str, ...], object]:
    """What `prill run` would run: its cells, the checks alone, and the second reading."""
    told = parsed(command)
    names, checks = run_command.selected(told["names"])  # type: ignore[arg-type]
    asked = product(told["models"], told["engines"], names)  # type: ignore[call-overload]
    device = str(told["device"])
    return {Cell(*each, device) for each in asked}, checks, told["second"]


@settings(deadline=None)
@given(
    model=WORDS, engine=WORDS, device=DEVICES, checks=st.lists(CHECKS, max_size=2),
    suite=st.sampled_from(suites()), second=st.sampled_from(["", "hf"]),
)  # fmt: skip
def test_a_cells_command_runs_the_cell_and_the_check(
    model: str, engine: str, device: str, checks: list[str], suite: str, second: str
) -> None:
    """The printed command names the model, engine, suite, device and check of the cell, and nothing else."""
    mine = [check for check in checks if check.startswith(f"{suite}.")]
    with patch.dict(os.environ, {SECOND_VARIABLE: second}):
        command = reproduce.cell(Cell("its name", engine, suite, device), model, *checks)
    wanted = {Cell(model, engine, suite, device)}
    assert cells_of(command) == (wanted, tuple(dict.fromkeys(mine)), second or None)


@settings(deadline=None)
@given(
    engine=WORDS, model=WORDS, path=st.sampled_from(sorted(paths.NAMES)), calls=st.integers(50, 400),
    timeout=st.sampled_from([300.0, 1.0, 12.5]), several=st.booleans(),
)  # fmt: skip
def test_a_probes_command_probes_the_same(
    engine: str, model: str, path: str, calls: int, timeout: float, several: bool
) -> None:
    """The printed command names the engine, model, path, calls and seconds of the probe."""
    told = parsed(again(Probe(engine, model, path, calls, timeout), tuple(paths.NAMES) if several else ()))
    named = {"engine": engine, "model": model, "path": "all" if several else path}
    assert named | {"calls": calls, "timeout": timeout} == {
        name: told[name] for name in ("engine", "model", "path", "calls", "timeout")
    }


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize("checks", [(), ("beta.second",)])
@pytest.mark.parametrize("collected", [True, False])
def test_a_cell_that_dies_is_run_again_where_it_died(
    tmp_path: Path, device: str, checks: tuple[str, ...], collected: bool
) -> None:
    """A cell that dies on a device, in a check or before any, names its device and what it was to run."""
    text = "import os\nfrom prill_harness.run.checks import check\n"
    text += '@check("beta.second", kills=("rope_pairing",))\ndef test_second(observe): os._exit(7)\n'
    (tmp_path / "beta.py").write_text(text if collected else "import os\nos._exit(7)\n")
    cell = Cell("a model.gguf", "numpy", "beta", device)
    records = executor.run(Plan("demo", (cell,), checks, tmp_path), tmp_path / "out", jobs=1)
    (found,) = (r for r in records if isinstance(r, Evidence))
    assert found.check == ("beta.second" if collected else "beta.process")
    where = "" if device == "cpu" else f" --device {device}"
    what = "beta.second" if collected or checks else "beta"
    assert found.reproduce == f"prill run --engine numpy --model 'a model.gguf'{where} {what}"


def test_a_probe_keeps_what_no_option_can_say(tmp_path: Path) -> None:
    """Fields of a probe are options of `prill leak`, or fixed by it: a new one has to be decided on."""
    said = {"engine", "model", "path", "calls", "timeout_s"}
    fixed = {"walk_s", "max_tokens", "vary", "stacks", "device"}
    assert {field.name for field in msgspec.structs.fields(Probe)} == said | fixed


def test_commands_are_written_in_one_place() -> None:
    """No other module of the harness joins the words of a command line; those of engines say how a library or
    a worker is started, which is no command of prill's."""
    root = Path(prill_harness.__file__).parent
    joining = {
        file.relative_to(root).as_posix()
        for file in root.rglob("*.py")
        if any(
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and (node.value.id, node.attr) in {("shlex", "join"), ("shlex", "quote")}
            for node in ast.walk(ast.parse(file.read_bytes()))
        )
    }
    library = {f"engines/others/capi/{name}.py" for name in ("played", "build")}
    started = {"leaks/judge/starved.py"}  # an engine's command with a variable before it
    assert joining - library - started == {"run/reproduce.py"}
