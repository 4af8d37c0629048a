"""An architecture that nobody has, described in one place, runs on every engine and is judged like any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from prill_harness.engines.embedded import Embedded
from prill_harness.faults.opening import open_engine
from prill_harness.numbers.lanes import lane_for
from prill_harness.stages.bisect import Report, bisect
from prill_harness.stages.bounds import stage_bounds
from prill_harness.stages.subject import open_subject, stage_table
from prill_harness.stages.trace import capture
from prill_runtime.device.model import DeviceModel
from prill_runtime.models import registry, walks
from prill_runtime.models.keys import Keys, heads
from prill_runtime.models.nodes.attention import Attention
from prill_runtime.models.nodes.feedforward import Dense
from prill_runtime.models.nodes.linear import Linear
from prill_runtime.models.nodes.network import Embed, Head, Layer, Network
from prill_runtime.models.nodes.norms import RmsNorm

from .decoded import decoded
from .tiny_gguf import add_tokenizer, write_gguf

IDS = [5, 300, 7, 261, 9, 9, 30, 301, 77, 12, 14, 200]


def model(keys: Keys) -> Network:
    """RMSNorm, learned positions, grouped queries in one tensor with k and v, GELU without a gate, tied."""
    width, ffn, context = (keys.integer(f"{n}_length") for n in ("embedding", "feed_forward", "context"))
    n, kv, size = heads(keys, width)
    eps, vocab = keys.positive("attention.layer_norm_rms_epsilon"), keys.vocabulary

    def layer(number: int) -> Layer:
        at, rows = f"blk.{number}.", [n * size, kv * size, kv * size]

        def part(place: int, heads: int) -> Linear:
            first = sum(rows[:place])
            name = f"{at}attn_qkv"
            return Linear(f"{at}{'qkv'[place]}", name, rows[place], width, False, heads, first, sum(rows))

        def linear(stage: str, name: str, rows: int, cols: int) -> Linear:
            return Linear(at + stage, at + name, rows, cols)

        return Layer(
            at,
            Attention(at, number, RmsNorm(f"{at}attn_norm", width, eps), part(0, n), part(1, kv), part(2, kv),
                      linear("attn_out", "attn_output", width, n * size), n, kv, size, size**-0.5),
            Dense(at, RmsNorm(f"{at}ffn_norm", width, eps), linear("up", "ffn_up", ffn, width),
                  linear("down", "ffn_down", width, ffn), activation="gelu_tanh"),
        )  # fmt: skip

    return Network(
        "nobodys", context, Embed("token_embd", vocab, width, "position_embd", context),
        tuple(layer(number) for number in range(keys.blocks())), RmsNorm("output_norm", width, eps),
        Head("token_embd", vocab, width, True),
    )  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of it: the tensors that its own nodes ask for, with random weights."""

    def configure(writer: gguf.GGUFWriter) -> None:
        writer.add_embedding_length(64)
        writer.add_feed_forward_length(96)
        writer.add_context_length(64)
        writer.add_block_count(2)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(1e-5)
        add_tokenizer(writer, "gpt2", 320)

    registry.declare("nobodys", model)
    shapes = {"token_embd.weight": (320, 64), "position_embd.weight": (64, 64), "output_norm.weight": (64,)}
    for layer in range(2):
        at = f"blk.{layer}."
        shapes |= {f"{at}attn_norm.weight": (64,), f"{at}ffn_norm.weight": (64,),
                   f"{at}attn_qkv.weight": (128, 64), f"{at}attn_output.weight": (64, 64),
                   f"{at}ffn_up.weight": (96, 64), f"{at}ffn_down.weight": (64, 96)}  # fmt: skip
    random = np.random.default_rng(0)
    tensors = {
        name: (("norm.weight" in name) + 0.2 * random.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    yield write_gguf(tmp_path_factory.mktemp("nobodys") / "m.gguf", "nobodys", tensors, [configure])
    del registry._declared["nobodys"]


def naive(path: Path, ids: list[int]) -> np.ndarray:
    """The same model, written out once more in float64 from the file's bytes: logits (id, vocab)."""
    w = {t.name.removesuffix(".weight"): t.data.astype(np.float64) for t in gguf.GGUFReader(path).tensors}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-5)) * w[name]

    x = w["token_embd"][ids] + w["position_embd"][: len(ids)]
    late = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for at in ("blk.0.", "blk.1."):
        q, k, v = np.split(norm(x, at + "attn_norm") @ w[at + "attn_qkv"].T, [64, 96], axis=-1)
        mixed = []
        for head in range(4):
            mine, theirs = slice(16 * head, 16 * head + 16), slice(16 * (head // 2), 16 * (head // 2) + 16)
            scores = np.exp(q[:, mine] @ k[:, theirs].T / 4 + late)
            mixed.append(scores / scores.sum(-1, keepdims=True) @ v[:, theirs])
        x = x + np.concatenate(mixed, axis=-1) @ w[at + "attn_output"].T
        up = norm(x, at + "ffn_norm") @ w[at + "ffn_up"].T
        act = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = x + act @ w[at + "ffn_down"].T
    return np.asarray(norm(x, "output_norm") @ w["token_embd"].T)


@pytest.mark.parametrize(
    ("engine", "bound"), [("numpy", 1e-10), ("numpy64", 1e-25), ("emu", 1e-10), ("emu:fast", 1e-10)]
)
def test_it_runs_on_every_engine(engine: str, bound: float, path: Path) -> None:
    """A prompt is what the naive reading of the file says, and so are single steps behind it."""
    expected = naive(path, IDS)
    with open_engine(engine, path) as opened:
        assert isinstance(opened, Embedded)
        got, model = np.asarray(opened.logits(IDS), np.float64), opened.model
        assert np.mean((got - expected) ** 2) < bound * np.mean(expected**2)
        if isinstance(model, DeviceModel):
            assert model.decoder.lowered.recorded == []  # every node has a fused piece on its first day
            cache = model.new_cache(len(IDS))
            model.prefill(cache, IDS[:4])
            for place, token in enumerate(IDS[4:], start=4):
                row = np.asarray(decoded(model, cache, token), np.float64)
                assert np.mean((row - expected[place]) ** 2) < bound * np.mean(expected[place] ** 2)
            cache.close()


def test_its_tables_follow_from_its_nodes(path: Path) -> None:
    """Stages in the order in which they are traced, features, and the shape of its cache."""
    with open_engine("numpy", path) as engine:
        assert isinstance(engine, Embedded)
        assert [name for name, _ in engine.trace(IDS)] == list(stage_table(path))
        assert walks.features(engine.model.network) == {
            "rms_norm", "learned_positions", "gqa", "fused_qkv", "gelu_tanh", "tied",
        }  # fmt: skip
        assert engine.model.network.cache_shape == (2, 2, 16)


def walked(path: Path, engine: str) -> Report:
    with open_engine(engine, path) as candidate, open_engine("numpy64", path) as oracle:
        lane = lane_for("f32", "float32")
        bounds = stage_bounds(path, lane, IDS, capture(oracle, IDS).stages)
        with open_subject(path) as subject:
            return bisect(candidate, oracle, IDS, subject, bounds)


@pytest.mark.parametrize(
    ("fault", "stage", "clause"),
    [
        ("gqa_interleaved", "blk.0.attn", "kv heads interleaved"),
        ("relu_for_gelu", "blk.0.act", "ReLU instead of GELU"),
        ("rms_eps_outside_root", "blk.0.attn_norm", "outside the square root"),
        ("learned_positions_from_one", "embed", "positions counted from 1"),
    ],
)
def test_bisect_names_a_fault_in_it(fault: str, stage: str, clause: str, path: Path) -> None:
    """Faults of node kinds are planted in it as in any other, and found where they are with the reason."""
    assert walked(path, "numpy").ok
    report = walked(path, f"numpy+fault:{fault}")
    assert report.findings[0].stages[0] == stage
    assert clause in report.sentence


def test_a_mistake_in_its_fused_rows_is_named(path: Path) -> None:
    """Keys and values in each other's rows, of a tensor whose thirds are no parts: both findings say so."""
    with open_engine("numpy64", path) as oracle, open_subject(path) as subject:
        right = capture(oracle, IDS)
        swapped = {"blk.0.k": right.stages["blk.0.v"], "blk.0.v": right.stages["blk.0.k"]}
        bounds = stage_bounds(path, lane_for("f32", "float32"), IDS, right.stages)
        report = bisect(replace(right, stages={**right.stages, **swapped}), oracle, IDS, subject, bounds)
    found = {finding.stages[0]: finding.explanation for finding in report.findings}
    for stage, rows in (("blk.0.k", "the v rows"), ("blk.0.v", "the k rows")):
        explained = found[stage]
        assert explained is not None
        assert explained.clause == f"{rows} of blk.0.attn_qkv used instead of blk.0.attn_qkv"


def test_its_description_is_short() -> None:
    """At most 40 lines, and nothing else of prill knows its name."""
    source = Path(__file__).read_text("utf-8")
    body = source[source.index("def model(") : source.index("@pytest.fixture")].strip().splitlines()
    assert len(body) <= 40
