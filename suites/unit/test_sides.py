"""Golden, file, oracle and candidate: whichever of them is wrong, the sentence says so of that one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from prill_harness import open_engine
from prill_harness.engines.base import Engine
from prill_harness.engines.embedded import Embedded, NumPy, NumPy64
from prill_harness.records.evidence import Status
from prill_harness.tokens.golden import Golden, record, save
from prill_harness.tokens.golden_pack import Packed
from prill_harness.tokens.judge import compare, compare_greedy, compare_prompt_ids
from prill_harness.tokens.sides import check_stale, of_another_file
from prill_runtime.errors import ModelFileError, NotANumber
from prill_runtime.ops.numpy import NumpyBackend

from .commandline import invoke
from .tiny_gguf import tiny

PROMPTS = ["the ab", "cd"]
Rows = list[NDArray[np.floating]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("sides") / "model.gguf")


@pytest.fixture(scope="module")
def golden(model: Path) -> Golden:
    return record(model, PROMPTS, tokens=24)


def changed(kind: type[Embedded], one_pass: Callable[[Rows], Rows], decoded: Callable[[Rows], Rows]) -> Any:
    """An engine of a kind whose logits come out changed: those of a pass, and those token by token."""

    class Changed(kind):  # type: ignore[misc, valid-type]
        def logits_batch(self, batch: Sequence[Sequence[int]]) -> Rows:
            return one_pass(super().logits_batch(batch))

        def decoded_logits(self, *given: Any) -> Rows:
            return decoded(super().decoded_logits(*given))

    return Changed


def same(rows: Rows) -> Rows:
    return rows


def scaled(rows: Rows) -> Rows:
    return [row * row.dtype.type(1.001) for row in rows]


def drifting() -> Callable[[Rows], Rows]:
    """No two calls give the same."""
    rng = np.random.default_rng(0)
    return lambda rows: [row + 1e-3 * rng.standard_normal(row.shape) for row in rows]


def stopping(rows: Rows) -> Rows:
    raise NotANumber("12 values are not finite", where="blk.0.q")


def shifted(golden: Golden) -> Golden:
    """The golden of an oracle whose logprobs were off at one step."""
    first = golden.prompts[0]
    logprobs = first.top_logprobs.array.copy()
    logprobs[20, 2:] -= np.float32(0.1)
    return msgspec.structs.replace(
        golden, prompts=[msgspec.structs.replace(first, top_logprobs=Packed.of(logprobs)), golden.prompts[1]]
    )


def as_it_is(golden: Golden) -> Golden:
    return golden


SOUND = changed(NumPy, same, same)
WRONG = changed(NumPy, scaled, scaled)
TODAY = changed(NumPy64, same, same)
# golden, today's oracle, candidate: what they come to, what is said, and whom nobody may blame.
STATES: dict[str, tuple[Callable[[Golden], Golden], Any, Any, Status, str, tuple[str, ...]]] = {
    "all agree": (as_it_is, TODAY, SOUND, Status.PASSED, "within the exact lane", ("stale", "oracle")),
    "engine wrong": (as_it_is, TODAY, WRONG, Status.FAILED, "regressed in the exact lane", ("stale",)),
    "golden stale": (
        shifted, TODAY, SOUND, Status.FAILED, "the candidate agrees with today's oracle",
        ("regressed", "neither"),
    ),
    "golden stale, engine wrong": (
        shifted, TODAY, WRONG, Status.FAILED, "the candidate agrees with neither: nmse", ("regressed",),
    ),
    "oracle changed": (
        as_it_is, changed(NumPy64, scaled, scaled), SOUND, Status.FAILED,
        "agrees with the golden: what has changed is the oracle, not the engine", ("regressed",),
    ),
    "oracle and engine changed alike": (
        as_it_is, changed(NumPy64, scaled, scaled), WRONG, Status.FAILED,
        "the golden is stale: today's oracle differs from it by", ("regressed", "neither"),
    ),
    "oracle not reproducible": (
        as_it_is, changed(NumPy64, drifting(), same), SOUND, Status.INCONCLUSIVE,
        "today's oracle does not reproduce itself", ("stale", "regressed", "candidate"),
    ),
    "oracle not reproducible, engine wrong": (
        as_it_is, changed(NumPy64, drifting(), same), WRONG, Status.INCONCLUSIVE,
        "neither the golden nor the engine can be judged", ("stale", "regressed"),
    ),
    "oracle contradicts itself": (
        as_it_is, changed(NumPy64, scaled, same), SOUND, Status.INCONCLUSIVE,
        "today's oracle contradicts itself", ("stale", "regressed", "candidate"),
    ),
    "oracle stops": (
        as_it_is, changed(NumPy64, stopping, same), SOUND, Status.INCONCLUSIVE,
        "today's oracle itself stops on this file", ("engine stopped", "stale"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_of_golden_oracle_and_candidate_the_wrong_one_is_named(
    model: Path, golden: Golden, state: str
) -> None:
    """Each combination of who is right gets one true sentence and blames nobody else."""
    was, oracle, engine, status, said, unsaid = STATES[state]
    with engine.open("", str(model)) as candidate, oracle.open("", str(model)) as today:
        findings = compare(candidate, was(golden), today)
    found = next(finding for finding in findings if finding.step == "logits")
    assert found.status is status, found.sentence
    assert said in found.sentence
    assert not [word for word in unsaid if word in found.sentence], found.sentence


@pytest.fixture(scope="module")
def oracle(model: Path) -> Iterator[Embedded]:
    with open_engine("numpy64", str(model)) as engine:
        assert isinstance(engine, Embedded)
        yield engine


@pytest.fixture(scope="module")
def sound(model: Path) -> Iterator[Engine]:
    with open_engine("numpy", str(model)) as engine:
        yield engine


class Tokenizes(NumPy):
    """An engine of its own tokenizer: `ids` of any text."""

    ids: tuple[int, ...] = ()

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        return list(self.ids)


@pytest.mark.parametrize("side", ["the golden", "today's oracle", "neither"])
def test_ids_of_a_stale_golden_are_not_blamed_on_the_engine(
    model: Path, golden: Golden, oracle: Embedded, side: str
) -> None:
    """Where golden and today's tokenizer differ, an engine that equals the golden is not passed either."""
    right = golden.prompts[0].ids
    stale = msgspec.structs.replace(golden.prompts[0], ids=[*right[:-1], 300])
    with Tokenizes.open("", str(model)) as engine:
        assert isinstance(engine, Tokenizes)
        engine.ids = tuple({"the golden": stale.ids, "today's oracle": right, "neither": [7]}[side])
        finding = compare_prompt_ids(engine, msgspec.structs.replace(golden, prompts=[stale]), oracle)
    assert finding.status is Status.FAILED
    assert "the golden is stale: prompt 0 has 300" in finding.sentence
    assert f"the candidate agrees with {side}" in finding.sentence


def test_a_current_golden_is_not_doubted(golden: Golden, oracle: Embedded) -> None:
    """Nothing is said of a golden that today's oracle reproduces."""
    assert check_stale(golden, oracle) is None


def test_a_stale_golden_says_where_and_since_when(golden: Golden, oracle: Embedded) -> None:
    """One logprob off by 1e-4 is found, with prompt, token and size, and the versions that have moved."""
    prompt = golden.prompts[1]
    logprobs = prompt.top_logprobs.array.copy()
    logprobs[7, 3] += 1e-4
    bad = msgspec.structs.replace(prompt, top_logprobs=Packed.of(logprobs))
    mark = msgspec.structs.replace(
        golden.fingerprint, versions={**golden.fingerprint.versions, "numpy": "1.0"}
    )
    stale = msgspec.structs.replace(golden, prompts=[golden.prompts[0], bad], fingerprint=mark)
    doubt = check_stale(stale, oracle)
    assert doubt is not None
    assert doubt.side == "golden"
    assert "0.0001" in doubt.sentence
    assert "prompt 1, token 7" in doubt.sentence
    assert "recorded with numpy 1.0, now" in doubt.sentence
    assert check_stale(stale, oracle, 1) is None, "only the first prompt was asked for"


def test_a_file_that_was_damaged_since_is_blamed_and_no_engine(golden: Golden, tmp_path: Path) -> None:
    """A tensor of the same file zeroed since: every step says that the file has changed, and none more."""

    def zeroed(tensors: dict[str, NDArray[np.float32]]) -> None:
        tensors["output.weight"][100:] = 0

    path = tiny(tmp_path / "model.gguf", edit=zeroed)
    with open_engine("numpy", str(path)) as engine:
        (finding,) = compare(engine, golden)
        again = compare_greedy(engine, golden)
    assert (finding.step, finding.status, finding.detail) == ("golden", Status.FAILED, {"side": "file"})
    assert "the file has changed since the golden was recorded, in its tensors" in finding.sentence
    assert not [word for word in ("stale", "regressed", "the candidate") if word in finding.sentence]
    assert again.sentence == finding.sentence


def test_a_setting_that_was_changed_since_is_named(golden: Golden, tmp_path: Path) -> None:
    """The same tensors under another epsilon: the file's key is named."""

    def eps(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0]["llama.attention.layer_norm_rms_epsilon"].value = 1e-6

    path = tiny(tmp_path / "model.gguf", metadata=eps)
    with open_engine("numpy64", str(path)) as engine:
        assert isinstance(engine, Embedded)
        doubt = of_another_file(golden, engine)
    assert doubt is not None
    assert (doubt.side, "in norm_eps" in doubt.sentence) == ("file", True)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_golden_of_another_model_says_whose_it_is(golden: Golden, tmp_path: Path, arch: str) -> None:
    """By name or by family another model: both are named with digest and tokenizer, and nothing is stale."""
    path = tiny(tmp_path / ("other.gguf" if arch == "llama" else "model.gguf"), arch, seed=5)
    with open_engine("numpy", str(path)) as engine:
        (finding,) = compare(engine, golden)
    assert (finding.step, finding.status) == ("golden", Status.FAILED)
    digest = golden.fingerprint.model_sha256[:12]
    assert f"belongs to another model: it was recorded from model f32 (sha256 {digest}" in finding.sentence
    assert f"this is {path.stem} f32 (sha256 {engine.info.model_sha256[:12]}" in finding.sentence
    assert finding.sentence.count("tokenizer ") == 2
    assert "stale" not in finding.sentence


def test_the_command_refuses_a_golden_of_another_model(golden: Golden, tmp_path: Path) -> None:
    """Given by hand, the wrong golden is a usage error; a damaged file under its own golden is a finding."""
    save(golden, tmp_path / "golden.json")
    given = ["golden", "compare", "--golden", str(tmp_path / "golden.json"), "--model"]
    other = invoke(*given, str(tiny(tmp_path / "other.gguf", seed=5)))
    assert (other.exit_code, other.stdout) == (4, "")
    assert "golden.json: the golden belongs to another model" in other.stderr
    damaged = invoke(*given, str(tiny(tmp_path / "model.gguf", seed=5)))
    assert damaged.exit_code == 1
    assert "golden: failed: the file has changed since the golden was recorded" in damaged.stdout


def test_a_mistake_in_the_code_of_both_is_not_blamed_on_one(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that is wrong whenever a step brings one row, in the oracle too: a golden recorded a moment
    ago is not called stale, nor the engine wrong."""
    attention = NumpyBackend.attention

    def decoding_wrong(self: NumpyBackend, q: Any, *rest: Any, **named: Any) -> Any:
        return attention(self, q * (1.5 if len(q) == 1 else 1), *rest, **named)

    monkeypatch.setattr(NumpyBackend, "attention", decoding_wrong)
    with open_engine("numpy", str(model)) as engine:
        findings = compare(engine, record(model, PROMPTS, tokens=24))
    logits = next(finding for finding in findings if finding.step == "logits")
    assert logits.status is Status.INCONCLUSIVE, logits.sentence
    assert "today's oracle contradicts itself: token by token it gives the golden's" in logits.sentence


def test_a_file_on_which_the_oracle_stops_is_blamed_for_it(tmp_path: Path) -> None:
    """A NaN in a weight stops the recording: the file is invalid, no engine has failed."""

    def broken(tensors: dict[str, NDArray[np.float32]]) -> None:
        tensors["blk.1.ffn_down.weight"][5, 3] = np.nan

    with pytest.raises(ModelFileError, match=r"the float64 oracle stops on this file.*in blk\.1\.down"):
        record(tiny(tmp_path / "model.gguf", edit=broken), PROMPTS, tokens=4)
