"""Engines of somebody else's, a class or a process, are opened, asked, and blamed for what they do wrong."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from prill_harness.engines.base import Capability
from prill_harness.engines.channels import process
from prill_harness.faults.opening import open_engine
from prill_runtime.errors import (
    EngineError,
    MissingCapability,
    UsageError,
)

from .commandline import child

MODEL = "fixture:gpt2-tiny"
IDS = [5, 300, 7, 261]
WORKER = f"exec:{sys.executable} -m prill_harness.engines.channels.worker"

CLASS = '''
import os, signal, sys, time
import numpy as np

class Mine:
    """Random logits of its own, and every defect that the environment names."""
    arithmetic, version, config = "float32", "1.2", {"width": 128}
    defect = os.environ.get("MINE", "")

    def __init__(self, model):
        self.model = model
        if self.defect == "load": raise MemoryError("no room for the weights")

    def tokenize(self, text, add_special=True):
        if self.defect == "ids": return ["a"]
        return [1] * add_special + [len(word) for word in text.split()]

    def logits(self, ids):
        if self.defect == "raise": raise KeyError("blk.7")
        if self.defect == "shape": return np.zeros(len(ids))
        if self.defect == "rows": return np.zeros((len(ids) + 1, 9))
        if self.defect == "words": return [["x"] * 9] * len(ids)
        if self.defect == "die": os._exit(3)
        if self.defect == "kill":
            print("last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.defect == "hang": time.sleep(600)
        return np.random.default_rng(ids).standard_normal((len(ids), 9)).astype(np.float32)

    def generate(self, ids, max_tokens, temperature=0.0, stop=(), ignore_eos=False, on_token=None, **rest):
        if temperature: raise NotImplementedError("greedy only")
        text = []
        while len(text) < max_tokens:
            text.append(len(text))
            if on_token is not None and on_token(text[-1], -1.0) is False:
                return dict(ids=text, logprobs=[-1.0] * len(text), finish_reason="cancelled")
        few = self.defect == "logprobs"
        said = "because" if self.defect == "reason" else "length"
        return dict(ids=text, logprobs=[-1.0] * (len(text) - few), finish_reason=said)
'''


@pytest.fixture(params=["py", "exec"])
def spec(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The class as a class, and behind a pipe."""
    (tmp_path / "mine.py").write_text(CLASS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield "py:mine.py:Mine" if request.param == "py" else f"{WORKER} mine.py:Mine"
    sys.modules.pop("prill_engine_mine", None)


def test_it_is_asked_and_answers(spec: str, tmp_path: Path) -> None:
    """Every call arrives with its arguments, and its answer comes back in type, form and precision."""
    with open_engine(spec, MODEL) as engine:
        assert engine.info.capabilities == {Capability.TOKENIZE, Capability.LOGITS, Capability.GENERATE}
        assert (engine.info.arithmetic, engine.info.version) == ("float32", "1.2")
        assert engine.info.config == {"width": 128}
        assert engine.tokenize("one three") == [1, 3, 5]
        assert engine.tokenize("one three", add_special=False) == [3, 5]
        rows = engine.logits(IDS)
        assert rows.dtype == np.float32
        expected = np.random.default_rng(IDS).standard_normal((4, 9)).astype(np.float32)
        np.testing.assert_array_equal(rows, expected)
        made = engine.generate(IDS, max_tokens=3)
        assert (made.ids, made.logprobs, made.finish_reason) == ((0, 1, 2), (-1.0,) * 3, "length")
    with pytest.raises(EngineError, match="engine is closed"):
        engine.logits(IDS)


def test_tokens_are_told_and_cancel(spec: str) -> None:
    """`on_token` hears each token as it is written, and its refusal reaches the engine."""
    heard: list[tuple[int, float]] = []

    def on_token(token: int, logprob: float) -> bool:
        heard.append((token, logprob))
        return token < 1

    with open_engine(spec, MODEL) as engine:
        made = engine.generate(IDS, max_tokens=5, on_token=on_token)
        assert heard == [(0, -1.0), (1, -1.0)]
        assert (made.ids, made.finish_reason) == ((0, 1), "cancelled")
        assert engine.generate(IDS, max_tokens=2).ids == (0, 1)


def test_what_it_lacks_is_inconclusive_by_name(spec: str) -> None:
    """A call that nothing answers, and one that the engine declines."""
    with open_engine(spec, MODEL) as engine:
        with pytest.raises(MissingCapability, match="does not offer detokenize"):
            engine.detokenize(IDS)
        with pytest.raises(MissingCapability, match="does not offer trace"):
            list(engine.trace(IDS))
        with pytest.raises(MissingCapability, match="greedy only"):
            engine.generate(IDS, max_tokens=2, temperature=1.0)


def test_a_class_that_only_has_logits(tmp_path: Path) -> None:
    """What does not generate lacks it by name."""
    (tmp_path / "bare.py").write_text(
        "class Bare:\n    def __init__(self, path): ...\n    def logits(self, ids): ...\n"
    )
    spec = f"py:{tmp_path / 'bare.py'}:Bare"
    with (
        open_engine(spec, MODEL) as engine,
        pytest.raises(MissingCapability, match="does not offer generate"),
    ):
        engine.generate(IDS, max_tokens=2)


@pytest.mark.parametrize(
    ("defect", "sentence"),
    [
        ("load", r"MemoryError: no room for the weights"),
        ("ids", r"tokenize: an answer of the wrong form: expected a list of token ids, got \['a'\]"),
        ("raise", r"logits: KeyError: 'blk.7'"),
        ("shape", r"logits: .*expected \(4, vocabulary\) numbers, got \(4,\)"),
        ("rows", r"logits: .*expected \(4, vocabulary\) numbers, got \(5, 9\)"),
        ("words", r"logits: .*expected numbers, got \[\['x'"),
        ("logprobs", r"generate: .*expected a logprob for each of 2 ids, got \(1,\)"),
        ("reason", r"generate: .*expected a finish_reason of eos, .*got 'because'"),
    ],
)
def test_its_mistakes_are_its_own(
    defect: str, sentence: str, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises or returns is one sentence with the engine, the call, and what was expected; and
    the next call is as good as the first."""
    monkeypatch.setenv("MINE", defect)
    if defect == "load":
        with pytest.raises(EngineError, match=sentence):
            open_engine(spec, MODEL)
        return
    with open_engine(spec, MODEL) as engine:
        calls = {
            "ids": lambda: engine.tokenize("a"),
            "logprobs": lambda: engine.generate(IDS, max_tokens=2),
            "reason": lambda: engine.generate(IDS, max_tokens=2),
        }
        with pytest.raises(EngineError, match=sentence):
            calls.get(defect, lambda: engine.logits(IDS))()
        if defect in calls:
            assert engine.logits(IDS).shape == (4, 9)
        else:
            assert engine.generate(IDS, max_tokens=2).ids == (0, 1)


@pytest.mark.parametrize(
    ("defect", "sentence"),
    [
        ("die", r"logits: the process ended with exit status 3"),
        ("kill", r"logits: the process was ended by SIGSEGV; it wrote: last words"),
        ("hang", r"logits: no answer: expected one in time, got none"),
    ],
)
@pytest.mark.parametrize("spec", ["exec"], indirect=True)
def test_a_process_that_fails_is_told_and_ended(
    defect: str, sentence: str, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Death and silence are the engine's, by signal, call and last words, and nothing is left running."""
    monkeypatch.setenv("MINE", defect)
    before = set(psutil.Process().children())
    with open_engine(f"{spec},timeout={1 if defect == 'hang' else 60}", MODEL) as engine:
        assert set(psutil.Process().children()) - before
        with pytest.raises(EngineError, match=sentence):
            engine.logits(IDS)
    assert set(psutil.Process().children()) <= before


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("hello", r"a line that is no JSON object: .*got b'hello'"),
        ("[1]", r"a line that is no JSON object"),
        ('{"id": 7, "result": 1}', r"an answer to another call: expected id 0, got 7"),
        ('{"id": 0}', r"neither a result nor an error"),
        ('{"id": 0, "token": 1, "logprob": 0}', r"neither a result nor an error"),
        ('{"id": 0, "result": {"name": "x"}}', r"hello without the calls"),
        ('{"id": 0, "result": {"base64": "?"}}', r"a result that is none: .*base64"),
        (
            '{"id": 0, "error": {"kind": "out_of_memory", "message": "4 GiB"}}',
            r"^out of memory in .*hello: 4 GiB",
        ),
        ("x" * 5000, r"a line without an end: expected at most 4096 bytes"),
    ],
)
def test_what_is_no_answer_is_named(
    answer: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Garbage, floods and answers out of turn."""
    monkeypatch.setattr(process, "LONGEST", 4096)
    script = tmp_path / "worker.sh"
    ending = "" if answer.startswith("xxx") else "\\n"
    script.write_text(f"#!/bin/sh\nread line\nprintf '%s{ending}' '{answer}'\nread line\n")
    script.chmod(0o755)
    before = set(psutil.Process().children())
    with pytest.raises(EngineError, match=sentence):
        open_engine(f"exec:{script} {{model}}", MODEL)
    assert set(psutil.Process().children()) <= before


def test_what_an_engine_prints_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's output and that of a C library, by its descriptor, keep out of the protocol."""
    (tmp_path / "loud.py").write_text(
        "import os\n"
        "class Loud:\n"
        "    def __init__(self, path): print('loading'); os.write(1, b'loaded\\n')\n"
        "    def tokenize(self, text, add_special=True): os.write(1, b'{}'); return [len(text)]\n"
    )
    monkeypatch.chdir(tmp_path)
    with open_engine(f"{WORKER} loud.py:Loud", MODEL) as engine:
        assert engine.tokenize("four") == [4]


def test_an_installed_package_offers_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point in the group `prill.engines` is an engine by its name, with options, in every cell."""
    (tmp_path / "mine.py").write_text(CLASS)
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[prill.engines]\nmine = mine:Mine\nbad = nosuch:Mine\n")

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(engine: str) -> str:
        done = child("run", "tokens.prompt_ids", "--engine", engine, "--model", MODEL, cwd=tmp_path)
        return f"{done.returncode} {done.stdout}{done.stderr}"

    assert re.search(r"^1 .*failed +tokens.prompt_ids .* mine:timeout=9 ", run("mine:timeout=9"), re.DOTALL)
    assert "entry point 'bad' of prill.engines: the module nosuch cannot be imported" in run("bad")
    assert "did you mean 'mine'?" in run("mini")
    for argument, sentence in (("timeout=0", "bad timeout"), ("slow", "mine takes options only")):
        done = child("gate", "--engine", f"mine:{argument}", "--model", MODEL, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (4, "")
        assert sentence in done.stderr


def test_a_class_that_has_stages_is_walked(tmp_path: Path) -> None:
    """`prill bisect` finds the first wrong stage of a class whose `trace` names them."""
    (tmp_path / "traced.py").write_text(
        "from prill_runtime.run.model import Model\n"
        "class Traced:\n"
        "    arithmetic = 'float32'\n"
        "    def __init__(self, path):\n"
        "        self.model = Model.load(path, dtype='float32')\n"
        "    def logits(self, ids):\n"
        "        return self.model.forward([(self.model.new_cache(len(ids)), ids)])[0]\n"
        "    def trace(self, ids):\n"
        "        found = {}\n"
        "        def keep(name, array):\n"
        "            found[name] = array * 1.01 if name == 'blk.1.attn' else array\n"
        "        self.model.forward([(self.model.new_cache(len(ids)), ids)], trace=keep)\n"
        "        return found\n"
    )
    done = child(
        "bisect", "--engine", "py:traced.py:Traced", "--model", MODEL, "--tokens", "16", cwd=tmp_path
    )
    assert "blk.1.attn is the first wrong stage" in done.stdout
    assert done.returncode == 1


def test_what_a_text_leaves_out_is_missing_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class may give a text alone, or ids with the best logprobs by id; reading what it left out is
    inconclusive, and what it gives in another form is its mistake."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "partial.py").write_text(
        "class Partial:\n"
        "    def __init__(self, model): pass\n"
        "    def generate(self, ids, max_tokens, **rest):\n"
        "        forms = [dict(text='a b'), dict(ids=[7, 8], top=[{7: -0.5, 9: -1.5}, [(8, -0.25)]]),\n"
        "                 dict(ids=[7], top=[{7: -1}] * 2), dict(ids=[7], top=[5]), dict(text=b'a'), {}]\n"
        "        return {**forms[max_tokens], 'finish_reason': 'length'}\n"
    )
    with open_engine("py:partial.py:Partial", MODEL) as engine:
        told = engine.generate(IDS, max_tokens=0)
        assert (told.text, told.top) == ("a b", ())
        for name in ("ids", "logprobs"):
            with pytest.raises(MissingCapability, match=f"does not tell the {name} of what it writes"):
                getattr(told, name)
        told = engine.generate(IDS, max_tokens=1)
        assert (told.ids, told.top) == ((7, 8), ({7: -0.5, 9: -1.5}, {8: -0.25}))
        with pytest.raises(MissingCapability, match="does not tell the logprobs"):
            _ = told.logprobs
        for form, sentence in (
            (2, "top logprobs for each of 1 ids, got 2"), (3, r"list of \(id, logprob\)"),
            (4, "expected a text"), (5, "expected a list of token ids, got None"),
        ):  # fmt: skip
            with pytest.raises(EngineError, match=sentence):
                engine.generate(IDS, max_tokens=form)


def test_what_is_declared_of_arithmetic_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`arithmetic=` of the spec goes before what the engine says."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.py").write_text(CLASS)
    with open_engine("py:other.py:Mine,arithmetic=half", MODEL) as engine:
        assert engine.info.arithmetic == "half"
    with pytest.raises(UsageError, match="unknown arithmetic"):
        open_engine("py:other.py:Mine,arithmetic=", MODEL)
