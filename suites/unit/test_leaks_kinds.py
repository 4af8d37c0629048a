"""Every call that an engine's protocol knows is on a path of the probe, and a leaking kind is named."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prill_harness import Engine, open_engine
from prill_harness.engines.base import Session
from prill_harness.engines.embedded import EmbeddedSession
from prill_harness.engines.models import resolve_model
from prill_harness.leaks.judge import judge, probe
from prill_harness.leaks.probed import kinds, paths
from prill_harness.leaks.probed.kinds import KINDS, CallSubject
from prill_harness.leaks.reports.report import JudgedSeries, LeakVerdict, Probe
from prill_runtime.errors import PrillError

PICO = "synth:llama-pico:f16"
# What reads or lends without a request's work: nothing is made for a caller that could be left behind.
BESIDE = {"accepts", "fits", "open", "info", "ops", "copy_bandwidth"}


@pytest.fixture
def subject(tmp_path: Path) -> Iterator[CallSubject]:
    with open_engine("numpy", PICO) as engine:
        yield CallSubject(engine, lambda f: open_engine("numpy", f), str(resolve_model(PICO)), 320, 16)


def test_every_call_of_the_protocol_is_made() -> None:
    """A method that engine or session gain is made by some kind of call, or this fails."""
    source = inspect.getsource(kinds)
    for cls in (Engine, Session):
        public = {name for name in vars(cls) if not name.startswith("_") and callable(getattr(cls, name))}
        missing = {name for name in public - BESIDE - {"registry"} if f".{name}(" not in source}
        assert not missing, f"{cls.__name__}: {missing}"


def test_an_embedded_engine_takes_every_kind(subject: CallSubject, tmp_path: Path) -> None:
    """All kinds are offered, and each is what it says: requests stop, fill, are refused."""
    made = kinds.offered(subject, tmp_path)
    assert made.keys() == KINDS.keys()
    ends: Counter[str] = Counter()
    generate = subject.engine.generate

    class Watched:
        def __getattr__(self, name: str) -> object:
            return getattr(subject_engine, name)

        def generate(self, *given: object, **named: object) -> object:
            try:
                done = generate(*given, **named)  # type: ignore[arg-type]
            except PrillError:
                ends["refused"] += 1
                raise
            ends[done.finish_reason] += 1
            return done

    subject_engine = subject.engine
    subject.engine = Watched()  # type: ignore[assignment]
    for n in range(18):
        for make in made.values():
            make(n)
    assert {"stop", "length", "context", "cancelled", "refused", "eos"} <= ends.keys()
    assert ends["stop"] == 18


def test_each_entry_point_is_called_in_every_round(
    subject: CallSubject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand rounds call each a thousand times: a leak in every two hundredth comes five times."""
    made, counts = kinds.offered(subject, tmp_path), Counter[str]()
    entries = {
        (cls, name)
        for cls in (type(subject.engine), EmbeddedSession)
        for base in (Engine, Session)
        for name in vars(base).keys() - BESIDE - {"registry", "length"}
        if not name.startswith("_") and callable(getattr(cls, name, None))
    }

    def counted(name: str, call: Any) -> Callable[..., Any]:
        def counting(*given: Any, **named: Any) -> Any:
            counts[name] += 1
            return call(*given, **named)

        return counting

    for cls, name in entries:
        monkeypatch.setattr(cls, name, counted(f"{cls.__name__}.{name}", getattr(cls, name)))
    for n in range(20):
        for make in made.values():
            make(n)
    assert len(entries) > 10
    few = {f"{cls.__name__}.{name}" for cls, name in entries if counts[f"{cls.__name__}.{name}"] < 20}
    assert few <= {"NumPy.close"}, few  # a load and its end: in one round of five


def test_malformed_files_are_refused_early_and_late(subject: CallSubject, tmp_path: Path) -> None:
    """Some are missing or no GGUF at all; others are refused when tensors or the tokenizer are looked at."""
    kinds.offered(subject, tmp_path)
    said = []
    for file in subject.files:
        with pytest.raises(PrillError) as refusal:
            open_engine("numpy", file)
        said.append(str(refusal.value))
    assert len(said) == 9
    for words in ("empty", "GGUF", "tensors are missing", "tokenizer.ggml.model"):
        assert any(words in sentence for sentence in said), words


def test_an_engine_without_files_or_text_is_asked_for_less(tmp_path: Path) -> None:
    """What an engine does not offer is left out, and the rest is made."""
    with open_engine("numpy", PICO) as engine:
        subject = CallSubject(engine, lambda f: open_engine("numpy", f), "none", 320, 16)
        made = kinds.offered(subject, tmp_path)
    assert made.keys() == KINDS.keys() - {"loaded", "malformed", "poisoned"}


def test_the_kind_that_leaves_something_is_named() -> None:
    """Kinds with at least half of the largest growth of a leaking series are told, others are not."""
    leak = JudgedSeries("host", "blocks", "blocks", LeakVerdict.LEAK, "")
    left = {"a": {"host blocks": 400}, "b": {"host blocks": 3, "python blocks": 9}, "c": {}}
    assert judge.sites([leak], left) == "; left by a (host blocks +400)"
    assert judge.sites([], left) == judge.sites([leak], {}) == ""


def test_a_rare_leak_of_one_kind_is_found_and_told() -> None:
    """16 bytes in every hundredth cancelled request show in 50 calls; the sentence names that kind."""
    report = probe.run(Probe("control:leak=block,on=cancel,every=100", "none", "requests", vary=False))
    assert report.verdict is LeakVerdict.LEAK
    assert report.sentence.endswith("left by cancelled (host blocks +1)"), report.sentence
    offered = {"greedy", "sampled", "cancelled", "filled", "refused", "held", "told"}
    assert report.kinds == dict.fromkeys(offered, 40 * paths.CALLS_OF_A_KIND)
    sound = probe.run(Probe("control:noise=churn", "none", "requests", vary=False))
    assert sound.verdict is LeakVerdict.CLEAN, sound.sentence
