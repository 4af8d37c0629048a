"""`prill new`: what is generated passes nothing as it is, says what to fill, and passes when it is filled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import prill_harness.engines.others.capi as capi
from prill_harness.decide import rootcause

from .commandline import child, invoke

MODEL = "fixture:llama-tiny"
ENGINE = """
    def __init__(self, model):
        from prill_harness.engines.connect import connect
        from prill_harness.engines.spec import EngineSpec

        self.engine = connect(EngineSpec.parse("numpy"), model)

    def tokenize(self, text, add_special=True):
        return self.engine.tokenize(text, add_special)

    def logits(self, ids):
        return self.engine.logits(ids)

    def generate(self, ids, max_tokens, **rest):
        return self.engine.generate(ids, max_tokens=max_tokens, **rest)
"""
CHECK = '''
from prill_harness.run.checks import check


@check("mine.first", kills=("rope_pairing",))
def test_first(engine, oracle, observe):
    """Logits are the oracle's."""
    got, want = engine.logits([1, 20, 30, 40]), oracle.logits([1, 20, 30, 40])
    observe.saw(got.size, oracle="numpy64 on the same file")
    observe.metric("nmse", ((got - want) ** 2).sum() / (want**2).sum(), at_most=1e-9)
'''


def prill(folder: Path, *words: str, code: int, **options: object) -> str:
    """What a command says in the folder, which ends with that exit code."""
    done = child(*words, cwd=folder, **options)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def begun(folder: Path, *words: str) -> str:
    """What `prill new` says, all of whose files hold no place that was forgotten."""
    said = prill(folder, "new", *words, code=0)
    files = [file for file in (folder / words[-1]).rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if "@" in file.read_text("utf-8").replace("@check", "") + file.name]
    return said


def test_an_engine_in_python_is_not_judged_until_it_is_filled(tmp_path: Path) -> None:
    """As generated its gate fails and says which methods to fill; three methods later checks pass."""
    assert "next: prill gate contract --engine py:mine/mine.py:Mine" in begun(
        tmp_path, "engine", "py", "mine"
    )
    spec = ("--engine", "py:mine/mine.py:Mine", "--model", MODEL)
    said = prill(tmp_path, "gate", "contract", *spec, code=1)
    assert "gate contract failed" in said
    assert "fill tokenize of Mine in mine.py" in said
    file = tmp_path / "mine" / "mine.py"
    text = file.read_text("utf-8")
    file.write_text(text[: text.index("    def __init__")] + ENGINE, encoding="utf-8")
    said = prill(tmp_path, "run", "contract.tokens", "contract.tokenization", *spec, code=0)
    assert "2 passed" in said


def test_a_worker_is_not_judged_until_it_is_filled(tmp_path: Path) -> None:
    """As generated every call of it is refused by name, and no check of its tokens is conclusive."""
    begun(tmp_path, "engine", "exec", "mine")
    spec = f"exec:{sys.executable} mine/mine.py"
    said = prill(tmp_path, "run", "contract.tokenization", "--engine", spec, "--model", MODEL, code=10)
    assert "in mine.py" in said
    assert "passed" not in said


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_library_is_not_judged_until_it_is_filled(tmp_path: Path) -> None:
    """It compiles without a warning; its checks fail with the call to fill, and the gate names it."""
    begun(tmp_path, "engine", "capi", "mine")
    words = [
        "cc",
        "-std=c11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fPIC",
        "-shared",
        f"-I{next(iter(capi.__path__))}",
    ]
    subprocess.run([*words, "-o", "libmine.so", "mine/mine.c"], cwd=tmp_path, check=True)
    checks = ("boundary.null_handles", "boundary.logits")
    said = prill(tmp_path, "run", *checks, "--engine", "capi:./libmine.so", "--model", MODEL, code=1)
    assert "2 failed" in said
    assert "fill prill_context_create in mine.c" in said
    place = {"engine": f"capi:{tmp_path}/libmine.so", "model": MODEL}
    assert rootcause._walked(place, (8,)) is None  # the walk fails, too, and names no stage


def test_an_architecture_is_not_known_until_it_is_described(tmp_path: Path) -> None:
    """Installed as generated, its files are refused with what to fill."""
    begun(tmp_path, "adapter", "magpie")
    info = tmp_path / "magpie" / "prill_magpie-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: prill-magpie\nVersion: 0.1\n")
    entries = (tmp_path / "magpie" / "pyproject.toml").read_text("utf-8").split("[project.entry-points.")[1:]
    lines = [each.replace('"', "").split("[tool")[0] for each in entries]
    (info / "entry_points.txt").write_text("".join(f"[{line}" for line in lines))
    model = tmp_path / "magpie.gguf"
    subprocess.run([sys.executable, "-c", WRITE, str(model)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "magpie")}
    done = subprocess.run(
        [sys.executable, "-c", "from prill_harness.cli import main; main()", "trace", "--model", str(model),
         "--ids", "1,2"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "fill model in prill_magpie.py" in done.stderr


WRITE = """
import sys, gguf, numpy as np
file = gguf.GGUFWriter(sys.argv[1], "magpie")
file.add_context_length(16)
file.add_tokenizer_model("llama")
file.add_token_list(["<unk>", "<s>", "</s>"])
file.add_token_scores([0.0] * 3)
file.add_token_types([2, 3, 3])
file.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
file.write_header_to_file(); file.write_kv_data_to_file(); file.write_tensors_to_file(); file.close()
"""


def test_a_suite_enters_a_gate_when_it_was_seen_to_kill(tmp_path: Path) -> None:
    """As generated: its claim is refused. Observing nothing, or not seen to kill: inconclusive.
    Seen: the gate passes, and `prill run` in the same folder finds the check."""
    begun(tmp_path, "suite", "mine")
    folder, file = tmp_path / "mine", tmp_path / "mine" / "checks" / "mine.py"
    for words in (["gate"], ["faults", "matrix", "--suites", "checks"]):
        said = prill(folder, *words, code=4)
        assert "the check mine.first claims to kill 'choose_a_fault', which is no planted fault" in said
    file.write_text(file.read_text("utf-8").replace("choose_a_fault", "rope_pairing"), encoding="utf-8")
    assert "mine.first (critical) is unproven" in prill(folder, "gate", code=10)
    said = prill(folder, "faults", "matrix", "--suites", "checks", code=1)
    assert "mine.first claims rope_pairing and does not kill it" in said
    file.write_text(CHECK, encoding="utf-8")
    said = prill(folder, "gate", code=10)
    assert "see it with `prill faults matrix --suites checks`" in said
    said = prill(folder, "faults", "matrix", "--suites", "checks", code=0)
    assert "mine.first kills 1 of the 1 faults that it claims: rope_pairing" in said
    assert "gate mine passed: 1 checks in 1 cells, 1 of 1 items proven" in prill(folder, "gate", code=0)
    assert "passed  mine.first" in prill(folder, "run", "mine.first", "--model", MODEL, code=0)
    spec = ("--engine", "numpy+fault:rope_pairing", "--model", MODEL)
    assert "failed  mine.first" in prill(folder, "run", "mine.first", *spec, code=1)


@pytest.mark.parametrize(
    ("file", "old", "new", "sentence"),
    [
        ("ci/gates.toml", "../checks", "../nowhere", "no check in the folder of suites"),
        ("checks/mine.py", '"mine.first"', '"tokens.greedy"', "prill has this name already"),
        ("checks/mine.py", '"mine.first"', '"other.first"', "a check is not named after its suite"),
        ("checks/mine.py", '("choose_a_fault",)', "tuple(NAMES)", "kills= is not written out"),
        ("checks/checklists/mine.toml", 'id = "mine.first"', 'id = "contract.numbers"', "an item of this id"),
    ],
)
def test_a_folder_of_suites_that_cannot_be_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str, sentence: str
) -> None:
    """Each is refused before anything runs, in one sentence."""
    monkeypatch.chdir(tmp_path)
    assert invoke("new", "suite", "mine").exit_code == 0
    monkeypatch.chdir(tmp_path / "mine")
    text = Path(file).read_text("utf-8")
    assert old in text
    Path(file).write_text(text.replace(old, new), encoding="utf-8")
    done = invoke("gate")
    assert done.exit_code == 4, done.output
    assert sentence in done.output
    assert not Path("out/ledger.jsonl").exists()


@pytest.mark.parametrize("name", ["a-b", "1st", "class", "Mine", "../up", "", "ünder"])
def test_a_name_that_is_none(tmp_path: Path, name: str) -> None:
    """One sentence, exit code 4, and nothing written."""
    done = invoke("new", "engine", "py", name, "--into", str(tmp_path))
    assert done.exit_code == 4
    assert "not a name for a module" in done.output
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """A folder, a file and a link that leads nowhere are left as they are; prill's suites are no new ones."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "plain", "link"):
        done = invoke("new", "suite", name, "--into", str(tmp_path))
        assert (done.exit_code, "nothing is overwritten" in done.output) == (4, True)
    assert invoke("new", "suite", "tokens", "--into", str(tmp_path)).exit_code == 4
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folder", "link", "plain"]
    assert (tmp_path / "plain").read_text() == "mine"


def told(*words: str) -> tuple[int, str]:
    """Exit code, and what a command says, in this process."""
    result = invoke(*words)
    return result.exit_code, result.output


def test_a_policy_is_written_that_plans_and_refuses_a_slip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As generated both of its gates plan, the default and the one that builds on it; a slip is told by line
    and nearest word, and the file is not overwritten."""
    monkeypatch.chdir(tmp_path)
    code, said = told("new", "gate", "push")
    assert (code, "next: put your engine into engines = [...] of ci/gates.toml" in said) == (0, True)
    assert "gate push: 2 cells" in told("plan")[1]
    assert "gate release: 2 cells" in told("plan", "release")[1]
    file = Path("ci/gates.toml")
    sound = file.read_text("utf-8")
    for words, what in (((), "is there already"), (("release",), "not a name for a gate")):
        code, said = told("new", "gate", *words)
        assert (code, what in said) == (4, True)
    file.write_text(sound.replace("max_flaky", "max_flacky"), "utf-8")
    line = next(n for n, text in enumerate(sound.splitlines(), 1) if text.startswith("max_flaky"))
    code, said = told("plan")
    assert (code, f"ci/gates.toml, line {line}: " in said, "did you mean 'max_flaky'?" in said) == (
        4,
        True,
        True,
    )


def test_the_gate_that_is_written_decides_by_every_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On nothing its release gate is red by what is missing: cells, speed, leaks and the document."""
    monkeypatch.chdir(tmp_path)
    assert told("new", "gate")[0] == 0
    Path("nothing.jsonl").touch()
    code, said = told("gate", "release", "--from", "nothing.jsonl")
    assert code == 1
    for rule in ("cells", "executed", "leaks", "performance", "documents"):
        assert f"rule {rule} " in said
