"""What the packaged gpt-oss and Gemma are for: whatever their files say matters, on every engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

import prill_fixtures
from prill_fixtures import vocab
from prill_fixtures.config import CONFIGS
from prill_harness.engines.embedded import Embedded
from prill_harness.engines.features import traits
from prill_harness.faults.opening import open_engine
from prill_harness.numbers import lanes
from prill_harness.tokens import judge
from prill_harness.tokens.golden import Golden, golden_for
from prill_harness.witness import naive as witness
from prill_harness.witness import sensitivity
from prill_harness.witness.reading import Reading
from prill_runtime.device.machine.emulator import EmuDevice
from prill_runtime.device.model import DeviceModel, Options

from .test_families import PROMPT, everything

OSS, GEMMA = "gpt-oss-tiny", "gemma3-tiny"
# NMSE; the fast engine's activations are rounded to 8 bits, or to half precision.
NOISE = {
    (OSS, "numpy"): 1e-11, (OSS, "emu"): 1e-11, (OSS, "emu:fast"): 1e-3,
    (GEMMA, "numpy"): 1e-11, (GEMMA, "emu"): 1e-11, (GEMMA, "emu:fast"): 1e-5,
}  # fmt: skip


@pytest.fixture(scope="module")
def expected() -> Mapping[str, Mapping[str, NDArray[np.float64]]]:
    """The oracle's logits of a prompt, of single steps behind it, and of a batch."""
    found = {}
    for name in (OSS, GEMMA):
        with open_engine("numpy64", f"fixture:{name}") as oracle:
            found[name] = everything(oracle)
    return found


@pytest.mark.parametrize(("name", "engine"), NOISE)
def test_it_runs_on_every_engine(name: str, engine: str, expected: Any) -> None:
    """Prompt, replayed single steps and a batch of three lengths, each within the engine's own noise."""
    with open_engine(engine, f"fixture:{name}") as opened:
        got = everything(opened)
    for part, want in expected[name].items():
        assert len(want) >= 4
        assert float(np.mean((got[part] - want) ** 2) / np.mean(want**2)) < NOISE[name, engine], part


@pytest.mark.parametrize("name", [OSS, GEMMA])
def test_its_golden_holds(name: str) -> None:
    """Ids, configuration, forced logits, greedy and drawn tokens of the NumPy engine are the golden's."""
    spec = f"fixture:{name}"
    with open_engine("numpy", spec) as engine, open_engine("numpy64", spec) as oracle:
        for step in ("prompt_ids", "config", "teacher_forced", "greedy", "sampled"):
            found = getattr(judge, f"compare_{step}")(engine, golden_for(spec), oracle)
            assert found.ok, found.sentence
            assert found.observed > 10, step


def test_the_mixture_is_stored_as_published_ones_are() -> None:
    """Experts in MXFP4, whose bytes are most of the file; routers and biases whole; in all at most 6 MB."""
    path = prill_fixtures.path(OSS)
    kinds: dict[T, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        kinds[tensor.tensor_type] = kinds.get(tensor.tensor_type, 0) + tensor.n_bytes
        experts = tensor.name.endswith("_exps.weight")
        assert experts == (tensor.tensor_type == T.MXFP4), tensor.name
        assert (tensor.tensor_type == T.F32) == (
            tensor.name.endswith(("bias", "norm.weight", "sinks.weight", "inp.weight"))
        )
    assert max(kinds, key=kinds.__getitem__) == T.MXFP4
    assert set(kinds) == {T.MXFP4, T.Q8_0, T.F32}
    assert path.stat().st_size < 6_000_000
    assert golden_for(f"fixture:{OSS}").type == "mxfp4"


@pytest.mark.parametrize("name", [OSS, GEMMA])
def test_its_shape_is_no_special_case(name: str) -> None:
    """Heads are together wider than the stream and share keys; windows end long before the prompts do."""
    config = CONFIGS[name]
    assert config.heads * config.head_dim > config.width
    assert 1 < config.kv_heads < config.heads
    assert all(len(prompt.ids) > 1.5 * config.window > 0 for prompt in golden_for(f"fixture:{name}").prompts)


def test_its_features_are_those_that_others_lack() -> None:
    """By these, checklist items and faults find it."""
    mixture, capped = (traits(f"fixture:{name}").features or frozenset() for name in (OSS, GEMMA))
    assert {"experts", "expert_bias", "sinks", "clamped", "yarn", "window", "bias", "gqa"} <= mixture
    assert {"softcap", "logit_softcap", "qk_norm", "post_norm", "two_bases", "window", "bias"} <= capped
    assert {"embedding_scale", "tied", "gelu_tanh"} <= capped


def test_a_turn_is_spelt_in_harmony() -> None:
    """Its special tokens are single ids that close the vocabulary; each prompt has three of them, read as
    tokens, and text alone is cut by o200k's rule."""
    reader = gguf.GGUFReader(prill_fixtures.path(OSS))
    said = {
        key: reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "pre", "eos_token_id")
    }
    tokens = said["tokens"]
    assert tuple(tokens[-len(vocab.HARMONY) :]) == vocab.HARMONY
    assert (said["pre"], tokens[said["eos_token_id"]]) == ("gpt-4o", "<|return|>")
    with open_engine("numpy", f"fixture:{OSS}") as engine:
        assert isinstance(engine, Embedded)
        for prompt in golden_for(f"fixture:{OSS}").prompts:
            names = [tokens[i] for i in prompt.ids if tokens[i] in vocab.HARMONY]
            assert names == ["<|start|>", "<|channel|>", "<|message|>"]
            assert engine.tokenize(prompt.text) == prompt.ids == vocab.encoder(OSS)[0](prompt.text)
        # A capital begins a word, and digits come in threes.
        whole, *pieces = (engine.tokenize(text) for text in
                          ("HelloWorld 12345", "Hello", "World", " ", "123", "45"))  # fmt: skip
    assert whole == [token for piece in pieces for token in piece]


# every expert, both ends of the clamp


@pytest.fixture(scope="module")
def traced() -> dict[str, NDArray[np.float64]]:
    """Stages of all golden sequences of the mixture, one below the other."""
    golden, found = golden_for(f"fixture:{OSS}"), dict[str, list[NDArray[np.float64]]]()
    with open_engine("numpy64", f"fixture:{OSS}") as oracle:
        for prompt in golden.prompts:
            for stage, array in oracle.trace(prompt.sequence):
                found.setdefault(stage, []).append(np.asarray(array))
    return {stage: np.concatenate(arrays) for stage, arrays in found.items() if arrays[0].ndim > 1}


@pytest.mark.parametrize("layer", range(2))
def test_every_expert_is_used(layer: int, traced: Any) -> None:
    """Over the golden sequences each expert is chosen at ten positions or more, four at each position, and
    the chosen have weights of their own."""
    routed = traced[f"blk.{layer}.routed"]
    assert ((routed > 0).sum(1) == CONFIGS[OSS].used).all()
    counts = (routed > 0).sum(0)
    assert len(counts) == CONFIGS[OSS].experts
    assert counts.min() >= 10, counts
    largest = routed.max(1)
    assert 0.3 < np.median(largest) < 0.95


@pytest.mark.parametrize("layer", range(2))
def test_the_clamp_is_reached_at_each_end(layer: int, traced: Any) -> None:
    """Gates beyond 7, and the other half beyond 7 and -7, each at ten places or more of each layer."""
    gate, up = (traced[f"blk.{layer}.expert_{part}"] for part in ("gate", "up"))
    for name, beyond in {"gate": gate > 7, "up": up > 7, "down": up < -7}.items():
        assert beyond.sum() >= 10, name


# whatever the file says matters


def zeroed(reading: Reading, *ends: str) -> Reading:
    """The file with 0 in all tensors whose names end so."""
    for name in [name for name in reading.tensors if name.endswith(ends)]:
        reading = reading.with_tensor(name, np.zeros_like(reading.all(name)))
    return reading


def sinkless(reading: Reading, layer: int, heads: slice = slice(None)) -> Reading:
    """Sinks so low that they take nothing, in a layer."""
    name = f"blk.{layer}.attn_sinks.weight"
    values = reading.all(name).copy()
    values[heads] = -1e4
    return reading.with_tensor(name, values)


def ones(reading: Reading, *ends: str) -> Reading:
    """The file with 1 in all tensors whose names end so."""
    for name in [name for name in reading.tensors if name.endswith(ends)]:
        reading = reading.with_tensor(name, np.ones_like(reading.all(name)))
    return reading


CHANGES: dict[tuple[str, str], Any] = {
    (OSS, "no sinks"): lambda r: sinkless(sinkless(r, 0), 1),
    (OSS, "no sinks in the first layer"): lambda r: sinkless(r, 0),
    (OSS, "no sinks in the second layer"): lambda r: sinkless(r, 1),
    (OSS, "the sinks of one head for all"): lambda r: r.with_tensor(
        "blk.0.attn_sinks.weight", np.repeat(r.all("blk.0.attn_sinks.weight")[:1], 4)),
    (OSS, "no window"): lambda r: r.with_keys(attention__sliding_window=512),
    (OSS, "a window one shorter"): lambda r: r.with_keys(attention__sliding_window=23),
    (OSS, "no attention factor"): lambda r: r.with_keys(
        rope__scaling__attn_factor=1 / (1 + 0.1 * np.log(4))),
    (OSS, "no scaling"): lambda r: r.with_keys(rope__scaling__factor=1.0),
    (OSS, "another bound of the scaling"): lambda r: r.with_keys(rope__scaling__yarn_beta_fast=32.0),
    (OSS, "three experts"): lambda r: r.with_keys(expert_used_count=3),
    (OSS, "no bias of q, k, v"): lambda r: zeroed(r, "attn_q.bias", "attn_k.bias", "attn_v.bias"),
    (OSS, "no bias of the attention's output"): lambda r: zeroed(r, "attn_output.bias"),
    (OSS, "no bias of the router"): lambda r: zeroed(r, "ffn_gate_inp.bias"),
    (OSS, "no bias of experts"): lambda r: zeroed(r, "_exps.bias"),
    (GEMMA, "no cap of the scores"): lambda r: r.with_keys(attn_logit_softcapping=0.0),
    (GEMMA, "no cap of the logits"): lambda r: r.with_keys(final_logit_softcapping=0.0),
    (GEMMA, "no window"): lambda r: r.with_keys(attention__sliding_window=512),
    (GEMMA, "a window one shorter"): lambda r: r.with_keys(attention__sliding_window=15),
    (GEMMA, "one base for all layers"): lambda r: r.with_keys(rope__freq_base_swa=200000.0),
    (GEMMA, "another base of the sixth layer"): lambda r: r.with_keys(rope__freq_base=5000.0),
    (GEMMA, "no scaling"): lambda r: r.with_keys(rope__scaling__type="none"),
    (GEMMA, "no weights of the heads' norms"): lambda r: ones(r, "attn_q_norm.weight", "attn_k_norm.weight"),
    (GEMMA, "no weights of the norms behind"): lambda r: ones(
        r, "post_attention_norm.weight", "post_ffw_norm.weight"),
    (GEMMA, "no bias of q, k, v"): lambda r: zeroed(r, "attn_q.bias", "attn_k.bias", "attn_v.bias"),
    (GEMMA, "no bias of the attention's output"): lambda r: zeroed(r, "attn_output.bias"),
}  # fmt: skip

# Seen by the exact lane, but less than the rounding of activations to eight bits may leave.
FAINT = ("no sinks in the second layer", "the sinks of one head for all", "a window one shorter")


def bounds(golden: Golden) -> list[lanes.Figures]:
    """Of the exact lane and of the file's type."""
    return [
        lanes.bounds(lane, golden.floor_of(lane.name)) for lane in (lanes.EXACT, lanes.type_lane(golden.type))
    ]


def figures(golden: Golden, path: Path, reading: Reading, expected: NDArray[np.float64]) -> lanes.Figures:
    """How far the oracle on the changed file is from the oracle, on one golden sequence."""
    tally = lanes.LogitTally()
    tally.add(expected, sensitivity.oracle_logits(path, reading, golden.prompts[0].sequence))
    return tally.figures()


@pytest.fixture(scope="module")
def whole() -> dict[str, NDArray[np.float64]]:
    """The oracle's logits of the first golden sequence of each."""
    found = {}
    for name in (OSS, GEMMA):
        sequence = golden_for(f"fixture:{name}").prompts[0].sequence
        with open_engine("numpy64", f"fixture:{name}") as oracle:
            found[name] = np.asarray(oracle.logits(sequence), np.float64)
    return found


@pytest.mark.parametrize("name", [OSS, GEMMA])
def test_the_file_as_it_is_keeps_every_bound(name: str, whole: Any) -> None:
    """What the changes below are held to, holds without a change."""
    golden, path = golden_for(f"fixture:{name}"), prill_fixtures.path(name)
    found = figures(golden, path, witness.read(path), whole[name])
    assert not any(lanes.broken(found, bound) for bound in bounds(golden))


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_what_the_file_says_moves_the_logits_out_of_bound(name: str, change: str, whole: Any) -> None:
    """Changed in the file, each leaves the bound of the exact lane, and all but faint ones that of the file's
    own type too."""
    golden, path = golden_for(f"fixture:{name}"), prill_fixtures.path(name)
    found = figures(golden, path, CHANGES[name, change](witness.read(path)), whole[name])
    exact, typed = bounds(golden)
    for bound in (exact,) if name == OSS and change in FAINT else (exact, typed):
        assert found.nmse > bound.nmse, f"{found.nmse:.2g} in a bound of {bound.nmse:.2g}"


# memory


@pytest.mark.parametrize(("name", "arithmetic"), [(OSS, "fast"), (GEMMA, "exact")])
def test_it_stays_within_its_estimate_and_gives_everything_back(name: str, arithmetic: str) -> None:
    """No purpose takes more than was estimated from the file's shapes, weights hardly more than the file."""
    device, path = EmuDevice(), prill_fixtures.path(name)
    model = DeviceModel.open(path, Options("emu", arithmetic, positions=128), device)
    cache = model.new_cache(100)
    model.forward([(cache, list(range(PROMPT)))])
    held = model.memory()
    assert all(held[purpose] <= size for purpose, size in model.estimate.items())
    stored = sum(tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors)
    assert 0.9 * stored < held["weights"] < 1.1 * stored
    assert held["cache"] > 0
    cache.close()
    model.close()
    assert not device._memory
