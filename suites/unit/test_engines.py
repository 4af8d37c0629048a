"""Opening engines by spec, and the embedded engines behind the protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from prill_harness import Capability, Engine, EngineSpec, open_engine, resolve_model
from prill_harness.engines.embedded import Embedded, array_bytes
from prill_runtime.errors import ContextLengthExceeded, EngineError, ModelFileError, PrillError, UsageError

from .tiny_gguf import tiny

IDS = [1, 260, 261, 262, 270, 5, 6]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("engines") / "model.gguf")


@pytest.fixture
def engine(model: Path) -> Iterator[Engine]:
    with open_engine("numpy", str(model)) as opened:
        yield opened


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("numpy", EngineSpec("numpy", "", ())),
        ("http:http://host:80/v1", EngineSpec("http", "http://host:80/v1", ())),
        ("numpy+fault:a", EngineSpec("numpy", "", ("a",))),
        ("cuda:1+fault:a+fault:b", EngineSpec("cuda", "1", ("a", "b"))),
    ],
)
def test_specs_are_taken_apart(text: str, expected: EngineSpec) -> None:
    """Name, argument with colons in it, and any number of faults."""
    assert EngineSpec.parse(text) == expected


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nmpy", "unknown engine.*numpy or numpy64"),
        ("", "incomplete"),
        ("numpy+fault:", "incomplete"),
        ("numpy:3", "takes no argument"),
        ("numpy+fault:no_such_fault", "no_such_fault"),
    ],
)
def test_a_wrong_engine_spec_is_one_sentence(model: Path, spec: str, words: str) -> None:
    """Unknown names list the known ones; nothing opens by default."""
    with pytest.raises(UsageError, match=words) as caught:
        open_engine(spec, str(model))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("/no/such/file.gguf", "no such file"),
        ("/", "a folder"),
        ("fixture:llama-huge", "unknown fixture.*llama-tiny"),
        ("fixture:llama-tiny:q9", "unknown block type.*q8_0"),
    ],
)
def test_a_wrong_model_spec_is_one_sentence(spec: str, words: str) -> None:
    """Missing files and unknown fixtures say so, and list what there is."""
    with pytest.raises((UsageError, ModelFileError), match=words):
        resolve_model(spec)


def test_info_says_what_the_engine_is(engine: Engine, model: Path) -> None:
    """Arithmetic, digest, capabilities and configuration come from the loaded model."""
    assert engine.info.arithmetic == "float32"
    assert engine.info.model == str(model)
    assert len(engine.info.model_sha256) == 64
    assert engine.info.capabilities == frozenset(Capability)
    assert engine.info.config["n_kv_heads"] == 2
    with open_engine("numpy64", str(model)) as oracle:
        assert oracle.info.arithmetic == "float64"
        assert oracle.info.model_sha256 == engine.info.model_sha256


def test_logits_batches_and_sessions_agree(engine: Engine) -> None:
    """Row i of every way to ask is the same prediction."""
    whole = engine.logits(IDS)
    assert whole.shape == (len(IDS), 320)
    assert whole.dtype == np.float32
    alone, other = engine.logits_batch([IDS, IDS[:3]])
    np.testing.assert_allclose(alone, whole, atol=1e-4)
    np.testing.assert_allclose(other, whole[:3], atol=1e-4)
    session = engine.session()
    fed = np.concatenate([session.feed(IDS[:4]), session.feed(IDS[4:])])
    np.testing.assert_allclose(fed, whole, atol=1e-4)
    assert session.length == len(IDS)
    assert not np.allclose(whole[0], whole[1])


def test_a_reset_session_is_as_good_as_new(engine: Engine) -> None:
    """After reset the same ids give the same bits; without it they do not."""
    session = engine.session()
    first = session.feed(IDS)
    again = session.feed(IDS)
    session.reset()
    assert session.length == 0
    np.testing.assert_array_equal(session.feed(IDS), first)
    assert not np.allclose(again, first)


def test_the_oracle_keeps_its_float64(model: Path, engine: Engine) -> None:
    """An engine's logits are in the precision it computes in: the oracle's are float64, and use it."""
    with open_engine("numpy64", str(model)) as oracle:
        assert isinstance(oracle, Embedded)
        exact = oracle.logits(IDS)
        assert exact.dtype == np.float64
        assert np.any(exact != exact.astype(np.float32))
        assert engine.logits(IDS).dtype == np.float32
        np.testing.assert_allclose(engine.logits(IDS), exact, atol=1e-3)


def test_greedy_generation_is_the_argmax_of_logits(engine: Engine) -> None:
    """Each generated id is the best of the logits before it, with that id's logprob."""
    made = engine.generate(IDS, max_tokens=5, ignore_eos=True)
    assert made.finish_reason == "length"
    rows = engine.logits([*IDS, *made.ids])[len(IDS) - 1 : -1]
    assert rows.argmax(-1).tolist() == list(made.ids)
    assert all(logprob < 0 for logprob in made.logprobs)


def test_on_token_sees_every_id_and_can_cancel(engine: Engine) -> None:
    """The callback gets (id, logprob) in order; False ends the generation."""
    seen: list[int] = []

    def on_token(token: int, logprob: float) -> bool:
        seen.append(token)
        return len(seen) < 3

    made = engine.generate(IDS, max_tokens=9, ignore_eos=True, on_token=on_token)
    assert made.finish_reason == "cancelled"
    assert seen == list(made.ids)
    assert len(seen) == 3


def test_trace_ends_with_the_logits(engine: Engine) -> None:
    """Stages in execution order from embed to logits; the last is what `logits` returns."""
    stages = list(engine.trace(IDS))
    names = [stage for stage, _ in stages]
    assert (names[0], names[-1]) == ("embed", "logits")
    assert "blk.1.q_rope" in names
    np.testing.assert_array_equal(stages[-1][1], engine.logits(IDS))


def test_memory_counts_the_caches_of_live_sessions(engine: Engine, model: Path) -> None:
    """Weights are the real arrays; each open session adds its cache, and closing it takes it away."""
    before = engine.memory()
    assert before["cache"] == 0
    assert before["process"] > before["weights"] > 0.9 * model.stat().st_size / 2
    session = engine.session(capacity=32)
    # 2 layers x 2 cache heads x 32 positions x 16 components x keys and values x 4 bytes
    assert engine.memory()["cache"] == 2 * 2 * 32 * 16 * 2 * 4
    session.close()
    assert engine.memory() | {"process": 0} == dict(before) | {"process": 0}
    with pytest.raises(EngineError, match="closed"):
        session.feed(IDS)


def test_arrays_are_counted_once_however_they_are_reached() -> None:
    """A view and its base are one; two arrays are two; other objects are nothing."""
    a = np.zeros(10)
    assert array_bytes([a, a[2:], {"again": a}, (a.reshape(2, 5),)]) == 80
    assert array_bytes({"x": a, "y": np.zeros(3, np.uint8), "z": "text"}) == 83


def test_closing_lets_go_and_is_harmless_twice(model: Path) -> None:
    """A closed engine holds no weights, and a call on it is an error, not a crash."""
    engine = open_engine("numpy", str(model))
    engine.close()
    engine.close()
    assert engine.memory()["weights"] == 0
    with pytest.raises(PrillError, match="closed"):
        engine.logits(IDS)


def test_more_ids_than_the_context_is_a_clear_error(engine: Engine) -> None:
    """64 positions fit, 65 do not; no ids at all are refused too."""
    assert engine.logits([1] * 64).shape[0] == 64
    with pytest.raises(ContextLengthExceeded):
        engine.logits([1] * 65)
    with pytest.raises(PrillError, match="no ids"):
        engine.logits([])
