"""An architecture that nobody has, described in one place, runs on every engine and is judged like any."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from prill_harness.engines.embedded import Embedded
from prill_harness.engines.features import Traits, traits
from prill_harness.faults.catalogue import catalogue
from prill_harness.faults.opening import open_engine
from prill_harness.numbers.lanes import lane_for
from prill_harness.plan.provenance import model_facts
from prill_harness.records.evidence import Cell, CellStarted
from prill_harness.records.ledger import Ledger
from prill_harness.stages.bisect import Report, bisect
from prill_harness.stages.bounds import stage_bounds
from prill_harness.stages.hypotheses.case import guesses
from prill_harness.stages.subject import open_subject, stage_table
from prill_harness.stages.trace import capture
from prill_harness.witness import naive as naive_witness
from prill_harness.witness import sensitivity
from prill_runtime.device.model import DeviceModel
from prill_runtime.models import registry, walks
from prill_runtime.models.keys import Keys, heads
from prill_runtime.models.nodes.attention import Attention
from prill_runtime.models.nodes.feedforward import Dense
from prill_runtime.models.nodes.linear import Linear
from prill_runtime.models.nodes.network import Embed, Head, Layer, Network
from prill_runtime.models.nodes.norms import RmsNorm

from .commandline import emitted, invoke
from .decoded import decoded
from .test_hypotheses import clean_cases, every_mistake_named
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


def test_its_hypotheses_follow_from_its_nodes(path: Path) -> None:
    """Every mistake that a stage's kind of node can make, made on it, is named: the rows of its one tensor,
    unequal as they are, among them."""
    with open_engine("numpy64", path) as oracle, open_subject(path) as subject:
        cases = clean_cases(subject, capture(oracle, IDS).stages, IDS)
        assert every_mistake_named(cases) > 100
        with np.errstate(all="ignore"):
            said = {kind: {clause for clause, _ in guesses(case)} for kind, case in cases.items()}
    assert {
        "the v rows of blk.1.attn_qkv used instead of blk.1.attn_qkv",
        "rows of blk.1.attn_qkv shifted by one",
    } < said["k"]
    assert "mean subtracted (LayerNorm instead of RMSNorm)" in said["attn_norm"]
    assert "ReLU instead of GELU (tanh)" in said["act"]
    assert "positions counted from 1 instead of 0" in said["embed"]


def test_its_checklist_follows_from_its_features(path: Path, tmp_path: Path) -> None:
    """A ledger with one cell of it has a list of its own: what every architecture is asked, positions because
    they are learned, and nothing of rope."""
    cell, facts = Cell("m.gguf", "numpy", "tokens"), model_facts(str(path))
    assert Traits.of_record(facts) == traits(str(path))
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.append(CellStarted(cell, (), 0.0, facts))
    done = invoke("checklist", "nobodys", "--ledger", str(tmp_path / "ledger.jsonl"), "--format", "json")
    shown = emitted(done.stdout)
    asked = {item["id"]: item["severity"] for item in shown["items"]}
    assert len(asked) == 20
    assert {"nobodys.oracle", "nobodys.tokens.exact", "nobodys.stages", "nobodys.positions.learned"} < {
        name for name, severity in asked.items() if severity == "critical"
    }
    assert "nobodys.tokens.configuration.unturned" in asked
    assert shown["left_out"] == {
        "nobodys": {
            "with rope": 1,
            "with rope and without temperature and without longrope": 1,
            "with temperature": 1,
            "with longrope": 1,
        }
    }
    assert done.exit_code == 10


def test_its_faults_follow_from_its_features(path: Path) -> None:
    """Of the catalogue those of what it has: RMSNorm, GELU, learned positions, grouped queries, tied head."""
    mine = traits(str(path))
    fit = {name: fault.applies_to(mine) for name, fault in catalogue().items()}
    assert all(fit[name] for name in (
        "gqa_interleaved", "kv_heads_ignored", "rms_eps_outside_root", "relu_for_gelu", "head_not_tied",
        "learned_positions_from_one", "attention_not_scaled", "embed_off_by_one", "logits_capped",
    ))  # fmt: skip
    assert not any(fit[name] for name in (
        "rope_pairing", "late_position_in_bfloat16", "layer_norm_no_bias", "gate_up_swapped", "gelu_for_silu",
        "linear_bias_dropped", "qkv_bias_dropped", "head_tied_anyway", "square_matrix_transposed",
    ))  # fmt: skip


def test_what_can_be_changed_in_it_follows_from_its_features(path: Path) -> None:
    """No rotation that is not there is varied; head count, eps and head are."""
    reading = naive_witness.read(path)
    varied = {variation.name for variation in sensitivity.variations(reading, len(IDS))}
    assert {"eps", "head count", "tie", "blk.0.attn_norm.weight"} < varied
    assert not any("rope" in name or name == "window" for name in varied)


def test_its_description_is_short() -> None:
    """At most 40 lines, and nothing else of prill knows its name."""
    source = Path(__file__).read_text("utf-8")
    body = source[source.index("def model(") : source.index("@pytest.fixture")].strip().splitlines()
    assert len(body) <= 40
