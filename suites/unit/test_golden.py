"""Goldens: recorded from the oracle, exact on disk, strict when read, found stale when they are."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from prill_harness import open_engine
from prill_harness.engines.embedded import Embedded
from prill_harness.tokens import golden as goldens
from prill_harness.tokens.golden import Golden, golden_for, load, record, save
from prill_harness.tokens.golden_pack import Packed
from prill_runtime.errors import PrillError, UsageError
from prill_runtime.run.model import Model, generate

from .tiny_gguf import tiny

PROMPTS = ["the ab", "cd"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("golden") / "model.gguf")


@pytest.fixture(scope="module")
def golden(model: Path) -> Golden:
    return record(model, PROMPTS, tokens=24)


@pytest.fixture(scope="module")
def oracle(model: Path) -> Iterator[Embedded]:
    with open_engine("numpy64", str(model)) as engine:
        assert isinstance(engine, Embedded)
        yield engine


def test_batched_recording_equals_generating_alone(model: Path, golden: Golden) -> None:
    """Greedy and sampled tokens are what `generate` gives for each prompt by itself."""
    with Model.load(model, dtype="float64") as alone:
        for prompt in golden.prompts:
            assert prompt.ids == alone.tokenizer.encode(prompt.text)
            made = generate(alone, prompt.ids, max_tokens=24, ignore_eos=True)
            assert list(made.ids) == prompt.tokens
            assert len(prompt.sampled) == 2
            for run in prompt.sampled:
                params = run.params
                made = generate(alone, prompt.ids, max_tokens=len(run.tokens), params=params, ignore_eos=True)
                assert list(made.ids) == run.tokens
                assert run.tokens != prompt.tokens[: len(run.tokens)]


def test_stored_logprobs_are_the_oracles(golden: Golden, oracle: Embedded) -> None:
    """Top 20 of each step, best first; the first is the token; each is the float32 of a forced logprob."""
    for prompt in golden.prompts:
        rows = oracle.logits(prompt.sequence)[len(prompt.ids) - 1 :]
        logprobs = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
        ids = prompt.top_ids.array
        assert ids.shape == (24, 20)
        assert ids[:, 0].tolist() == prompt.tokens
        np.testing.assert_allclose(
            prompt.top_logprobs.array, np.take_along_axis(logprobs, ids, -1), rtol=2**-23
        )


def test_margins_count_themselves(golden: Golden) -> None:
    """The ladder and the median follow from the stored logprobs."""
    gaps = np.concatenate([prompt.margins for prompt in golden.prompts])
    assert golden.margins.positions == gaps.size == 48
    assert golden.margins.below["0.1"] == np.count_nonzero(gaps <= 0.1)
    assert golden.margins.quantiles["0.5"] == pytest.approx(np.median(gaps))


def test_floors_of_both_lanes_are_measured(golden: Golden) -> None:
    """An F32 file has the exact lane and float16's; rounding activations is far noisier than float32."""
    assert set(golden.floors) == {"exact", "f16"}
    assert 0 < golden.floors["exact"].nmse < 1e-9 < golden.floors["f16"].nmse
    assert golden.floors["exact"].positions == sum(len(p.sequence) for p in golden.prompts)


def test_a_saved_golden_is_read_back_bit_for_bit(golden: Golden, tmp_path: Path) -> None:
    """Float32 logprobs survive JSON exactly, and no temporary file stays."""
    save(golden, tmp_path / "deep" / "g.json")
    assert load(tmp_path / "deep" / "g.json") == golden
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["g.json"]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("schema",), 99, "schema 99"),
        (("prompts", 0, "tokens"), "text", r"\$\.prompts\[0\]\.tokens"),
        (("prompts", 1, "tokens"), [1], "different lengths"),
        (("prompts",), [], "at least one prompt"),
        (("floors",), {}, "exact lane"),
        (("unknown",), 1, "unknown"),
        (("prompts", 0, "top_ids", "data"), base64.b64encode(b"xx").decode(), "needs .* bytes"),
    ],
)
def test_a_damaged_golden_names_the_place(
    golden: Golden, tmp_path: Path, path: tuple[str | int, ...], value: object, words: str
) -> None:
    """One sentence with the path inside the file; never a traceback, never a shorter golden."""
    tree = json.loads(msgspec.json.encode(golden))
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    file = tmp_path / "g.json"
    file.write_text(json.dumps(tree))
    with pytest.raises(UsageError, match=words):
        load(file)


def test_a_missing_golden_is_one_sentence(tmp_path: Path) -> None:
    """Absence is an error, not an empty golden."""
    with pytest.raises(UsageError, match="cannot read the golden"):
        load(tmp_path / "none.json")


def test_large_ids_take_four_bytes() -> None:
    """A vocabulary above 65,536 keeps its ids."""
    ids = np.array([[1, 70000]])
    assert Packed.of(ids).array.tolist() == ids.tolist()
    assert Packed.of(ids).dtype == "<u4"
    assert Packed.of(np.array([65535])).dtype == "<u2"


def test_a_users_file_is_recorded_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first use records into $PRILL_CACHE; later ones read that file, also for a copy of the model,
    whose golden carries the copy's name."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(goldens, "TOKENS", 4)
    steps: list[int] = []
    first = golden_for(model, progress=lambda done, total: steps.append(done))
    assert steps == list(range(1, len(steps) + 1))
    monkeypatch.setattr(goldens, "record", lambda *args, **kwargs: pytest.fail("recorded twice"))
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.read_bytes())
    assert golden_for(copy) == msgspec.structs.replace(first, name="copy")
    assert first.name == "model"
    assert first.fingerprint.model_sha256 in {file.name.split(".")[0] for file in (tmp_path).rglob("*.json")}


def test_prompts_that_do_not_fit_give_way_to_others(model: Path) -> None:
    """A context of 64 leaves out 100 bytes of text, for which another text stands; no tokens is refused."""
    made = record(model, ["ab", "x" * 100], tokens=2).prompts
    assert made[0].text == "ab"
    assert len(made) == 2
    assert all(len(prompt.ids) <= 32 for prompt in made)
    assert len(record(model, ["x" * 100], tokens=2).prompts) == 1
    with pytest.raises(UsageError, match="nothing to record"):
        record(model, ["ab"], tokens=0)


def test_recording_a_broken_file_is_a_clean_error(tmp_path: Path) -> None:
    """A file that is no GGUF gives prill's own error."""
    (tmp_path / "bad.gguf").write_bytes(b"nope")
    with pytest.raises(PrillError):
        record(tmp_path / "bad.gguf", PROMPTS)
