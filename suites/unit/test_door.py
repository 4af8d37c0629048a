"""The door before every command: a wrong name is one sentence, exit 4, and nothing was done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest

from prill_harness import cli
from prill_harness.commands.shared import door
from prill_harness.decide.waivers import LOCAL
from prill_harness.plan.provenance import file_digest
from prill_harness.records.verdict import Verdict
from prill_runtime.errors import UsageError

from .commandline import invoke
from .test_plugin import SUITE, run

DATA = Path(__file__).parent / "data"
FIXTURE = "fixture:llama-tiny"


def leaves(
    command: click.Command, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below this one that is no group."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        assert inner is not None
        yield from leaves(inner, (*path, name))


LEAVES = dict(leaves(cli.cli))
# What a wrong name is written as, by the parameters that may hold it, and a word of the sentence about it.
WRONG = {
    door.ENGINES: [
        ("nmpy", "did you mean 'numpy'?"),
        ("numpy:3", "takes no argument"),
        ("cuda:sideways", "bad engine argument"),
        ("numpy+fault:rope_paring", "did you mean 'rope_pairing'?"),
    ],
    door.MODELS: [
        ("fixture:lama-tiny", "did you mean 'llama-tiny'?"),
        ("fixture:llama-tiny:q4_1", "unknown block type"),
        ("synth:llama-2b:f16", "unknown shape"),
        ("absent.gguf", "no such file"),
        ("broken.gguf", "broken.gguf"),
    ],
    ("device",): [("tpu", "unknown device")],
}
WRONG[door.FILES] = WRONG[door.MODELS]
REQUIRED = {
    "model": FIXTURE, "first": FIXTURE, "names": "rope_pairing", "name": "rope_pairing", "severity": "high",
    "engine": "numpy", "expires": "2999-01-01",
    **dict.fromkeys(("component", "symptom", "signature", "item", "owner", "issue", "reason"), "some text"),
}  # fmt: skip


def words_for(path: tuple[str, ...], asked: click.Parameter, value: str) -> list[str]:
    """The command line of a command with one parameter given, and what it needs besides."""
    command = LEAVES[path]
    words = list(path)
    for parameter in command.params:
        if parameter is asked or not parameter.required:
            continue
        sound = REQUIRED[str(parameter.name)]
        words += [sound] if isinstance(parameter, click.Argument) else [parameter.opts[0], sound]
    return [*words, *([value] if isinstance(asked, click.Argument) else [asked.opts[0], value])]


CASES = [
    pytest.param(path, parameter, value, told, id=f"{' '.join(path)} {parameter.name} {value}")
    for path, command in LEAVES.items()
    for parameter in command.params
    for names, wrong in WRONG.items()
    if parameter.name in names and not getattr(parameter, "is_flag", False)
    for value, told in wrong
]


@pytest.mark.parametrize(("path", "parameter", "value", "told"), CASES)
def test_a_wrong_name_stops_every_command(
    path: tuple[str, ...],
    parameter: click.Parameter,
    value: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever names an engine, a fault, a model or a device: exit 4, one sentence, no file, no golden."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "cache"))
    Path("broken.gguf").write_bytes(b"GGUF" + b"\xff" * 60)
    result = invoke(*words_for(path, parameter, value))
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (4, "", 1), result.stderr
    assert told in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["broken.gguf"]


def test_the_door_sees_every_command() -> None:
    """The cases above reach each command that has an engine or a model."""
    reached = {case.values[0] for case in CASES}
    assert reached == {
        ("gate",), ("run",), ("golden", "record"), ("golden", "show"), ("golden", "compare"), ("bisect",),
        ("trace",), ("leak",), ("bench",), ("generate",), ("inspect",), ("vram",), ("faults", "matrix"),
        ("requests",), ("incident", "new"), ("waive", "add"), ("plan",),
    }  # fmt: skip


@pytest.mark.parametrize("spec", ["numpy64", "numpy64:", "numpy64+fault:rope_pairing"])
@pytest.mark.parametrize(
    "words",
    [("gate",), ("run", "blocks"), ("golden", "compare", "--model", FIXTURE), ("bisect", "--model", FIXTURE)],
    ids=" ".join,
)
def test_the_oracle_is_never_judged_by_itself(
    words: tuple[str, ...], spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is spelled, and with a fault planted too, which leaves the rest of it what the oracle is."""
    monkeypatch.chdir(tmp_path)
    result = invoke(*words, "--engine", spec)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (4, "", 1)
    assert "an engine is never its own oracle" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_oracle_of_a_bisect_is_the_one_it_names() -> None:
    """Against another the oracle may be judged; no engine against itself, the default one included."""
    with pytest.raises(UsageError, match="never its own oracle"):
        door.judged(["cuda:fast"], "cuda")
    door.judged(["numpy64"], "numpy")
    door.judged(["numpy", "emu:fast"])
    result = invoke("bisect", "--model", FIXTURE, "--against", "numpy")
    assert result.exit_code == 4
    assert "never its own oracle" in result.stderr


def test_pytest_refuses_the_oracle_too(tmp_path: Path) -> None:
    """A suite of one's own, run by pytest itself: usage error, and nothing is recorded."""
    code, records, printed = run(tmp_path, SUITE, "--prill-engine", "numpy64+fault:rope_pairing")
    assert (code, records) == (4, ())
    assert "an engine is never its own oracle" in printed


# --- policies, checklists and waivers ------------------------------------------------------------------

POLICY = """default = "small"
[gates.small]
checklists = ["foundation"]
never_waive = ["foundation.kernels.blocks"]
[[gates.small.plan]]
models = ["fixture:llama-tiny"]
engines = ["numpy"]
suites = ["blocks"]
devices = ["cpu"]
[gates.other]
extends = "small"
"""
WAIVER = """
[[waivers]]
id = "W-1"
item = "foundation.model.tensors"
conditions = { engine = "numpy", device = "cpu", model = "fixture:llama-tiny" }
check = "file.weights"
signature = "KL is above"
owner = "ada"
issue = "17"
reason = "known"
created = 2026-01-01
expires = 2026-03-31
"""


def gated(tmp_path: Path, policy: str = POLICY, waivers: str = WAIVER) -> tuple[int, str]:
    """Exit code and sentence of a gate that decides on an empty ledger, in the current folder."""
    Path("gates.toml").write_text(policy)
    LOCAL.parent.mkdir()
    LOCAL.write_text(waivers)
    Path("nothing.jsonl").touch()
    result = invoke("gate", "--policy", "gates.toml", "--from", "nothing.jsonl")
    return result.exit_code, result.stderr


def test_a_sound_policy_and_waiver_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples that the cases below change are in order: the gate decides (on nothing: inconclusive)."""
    monkeypatch.chdir(tmp_path)
    assert gated(tmp_path) == (10, "")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('checklists = ["foundation"]', 'checklists = ["fundation"]', "did you mean 'foundation'?"),
        (
            '["foundation.kernels.blocks"]',
            '["foundation.kernel.blocks"]',
            "did you mean 'foundation.kernels.blo",
        ),
        ('engines = ["numpy"]', 'engines = ["nump"]', "unknown engine"),
        ('engines = ["numpy"]', 'engines = ["numpy64"]', "never its own oracle"),
        ('engines = ["numpy"]', 'engines = ["numpy+fault:no_such"]', "unknown planted fault"),
        ('suites = ["blocks"]', 'suites = ["block"]', "no such suite: expected"),
        ('models = ["fixture:llama-tiny"]', 'models = ["fixture:llama-huge"]', "unknown fixture"),
        ('devices = ["cpu"]', 'devices = ["gpu"]', "unknown device"),
        ('extends = "small"', 'extends = "smal"', "did you mean 'small'?"),
    ],
)
def test_a_policy_entry_that_names_nothing_is_refused(
    old: str, new: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of entry, also of a gate that was not asked for: exit 4, the policy named."""
    monkeypatch.chdir(tmp_path)
    assert old in POLICY
    code, sentence = gated(tmp_path, POLICY.replace(old, new))
    assert (code, sentence.count("\n")) == (4, 1)
    changed = POLICY.replace(old, new).splitlines()
    line = next(number for number, text in enumerate(changed, 1) if new in text)
    assert sentence.startswith(f"invalid policy in gates.toml, line {line}")
    assert told in sentence
    assert not Path("out").exists()


def test_an_entry_of_another_gate_is_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy is right as a whole, or it is not."""
    monkeypatch.chdir(tmp_path)
    code, sentence = gated(tmp_path, POLICY + 'checklists = ["lama"]\n')
    assert code == 4
    assert "gate other: names an unknown checklist" in sentence


def test_a_model_of_the_policy_must_be_there_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that the plan names and that is absent: exit 4; no cell runs."""
    monkeypatch.chdir(tmp_path)
    Path("gates.toml").write_text(
        POLICY.replace('models = ["fixture:llama-tiny"]', 'models = ["absent.gguf"]')
    )
    result = invoke("gate", "--policy", "gates.toml")
    assert (result.exit_code, result.stderr.count("\n")) == (4, 1)
    assert "absent.gguf" in result.stderr
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('item = "foundation.model.tensors"', 'item = "foundation.model.tensor"', "names an unknown item"),
        ('check = "file.weights"', 'check = "file.weight"', "did you mean 'file.weights'?"),
        (
            'check = "file.weights"',
            'check = "file.digest"',
            "a check that foundation.model.tensors does not count",
        ),
        ('engine = "numpy"', 'engine = "nump"', "unknown engine"),
        ('device = "cpu"', 'device = "gpu"', "unknown device"),
        ('model = "fixture:llama-tiny"', 'model = "fixture:lama-tiny"', "did you mean 'llama-tiny'?"),
        ('model = "fixture:llama-tiny"', 'model = "/data/own.gguf"', "expected its name in the reports"),
    ],
)
def test_a_waiver_of_nothing_is_refused(
    old: str, new: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item, check, engine, device or packaged model that does not exist: exit 4, waiver and file named."""
    monkeypatch.chdir(tmp_path)
    assert old in WAIVER
    code, sentence = gated(tmp_path, waivers=WAIVER.replace(old, new))
    assert (code, sentence.count("\n")) == (4, 1)
    assert sentence.startswith(f"invalid waivers in {LOCAL}, waiver W-1: ")
    assert told in sentence


@pytest.mark.parametrize(
    ("words", "near", "code"),
    [
        (("faults", "show", "rope_paring"), "rope_pairing", 4),
        (("faults", "run", "rope_paring"), "rope_pairing", 4),
        (("faults", "run", "rope_pairing+gelu_er"), "gelu_erf", 4),
        (("faults", "matrix", "--only", "roe"), "rope", 4),
        (("report", "--ledger", "l.jsonl", "--verdict", "v.json", "--format", "markdwn"), "markdown", 4),
        (("run", "tokens.gredy"), "tokens.greedy", 5),
        (("run", "tokns"), "tokens", 5),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_the_nearest_word_is_suggested(
    words: tuple[str, ...], near: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is named, a slip of the finger is told the word that was meant."""
    monkeypatch.chdir(tmp_path)
    Path("l.jsonl").touch()
    sample = msgspec.json.decode((DATA / "verdict.json").read_bytes(), type=Verdict)
    sealed = msgspec.structs.replace(sample, checks=()).sealed(file_digest(Path("l.jsonl")))
    Path("v.json").write_bytes(msgspec.json.encode(sealed))
    result = invoke(*words)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1)
    assert f"did you mean '{near}'?" in result.stderr


@pytest.mark.parametrize(
    ("words", "noun", "told"),
    [
        (
            ("checklist", "nosuch"),
            "usage error: ",
            "expected adapter or boundary or contract or foundation or gemma3 or gpt or gpt-oss or gpt2 or "
            "integration or llama or model",
        ),
        (("checklist", "lama"), "usage error: ", "did you mean 'llama'?"),
        (("gate", "foundatoin"), "usage error in ", "no such gate"),
        (("gate", "--waivers", "x.toml"), "invalid waivers in x.toml", "not a TOML file"),
        (("gate", "--policy", "x.toml"), "invalid policy in x.toml", "not a TOML file"),
        (("gate", "--kills", "x.toml"), "invalid kill matrix in x.toml", "not a kill matrix"),
        (("gate", "--from", "x.toml"), "invalid ledger in x.toml line 1", "not JSON"),
        (("checklist", "--ledger", "x.toml"), "invalid ledger in x.toml line 1", "not JSON"),
        (
            ("report", "--ledger", "x.toml", "--verdict", "x.toml"),
            "invalid verdict in x.toml",
            "not a verdict",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_the_error_names_what_is_wrong(
    words: tuple[str, ...], noun: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checklist, waivers, a ledger or a wrong word is not blamed on the policy; the sentence says which."""
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text("what = = is this\n")
    result = invoke(*words)
    assert (result.exit_code, result.stderr.count("\n")) == (4, 1)
    assert result.stderr.startswith(noun)
    assert told in result.stderr
