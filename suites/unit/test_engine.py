"""However the work is cut up, the logits are the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prill_runtime.errors import ContextLengthExceeded, InvalidParameter, NotANumber, UsageError
from prill_runtime.models.base import Pass
from prill_runtime.models.cache import KVCache
from prill_runtime.models.nodes.network import Network
from prill_runtime.ops.numpy import NumpyBackend
from prill_runtime.ops.protocol import Array
from prill_runtime.ops.rounded import RoundedBackend
from prill_runtime.run.model import Model

from .tiny_gguf import tiny

IDS = [1, 40, 300, 7, 261, 9, 262, 319, 0, 55, 56, 57]
Trace = list[tuple[str, Array]]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("models") / f"{request.param}.gguf", request.param)


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with Model.load(path, dtype="float64") as opened:
        yield opened


def alone(model: Model, ids: list[int]) -> Array:
    return model.forward([(model.new_cache(), ids)])[0]


def close(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max() < 1e-11)


def test_any_chunking_is_one_prefill(model: Model) -> None:
    """Every way to cut the ids into two, and one id at a time, give the same logits and cache length."""
    whole = alone(model, IDS)
    assert whole.shape == (len(IDS), model.vocab_size)
    cuts = [[IDS[:n], IDS[n:]] for n in range(1, len(IDS))] + [[[token] for token in IDS]]
    for pieces in cuts:
        cache = model.new_cache()
        parts = [model.forward([(cache, piece)])[0] for piece in pieces]
        assert close(np.concatenate(parts), whole)
        assert cache.length == len(IDS)
    # Negative control: without the cache the later pieces differ.
    assert not close(alone(model, IDS[6:]), whole[6:])


def test_a_ragged_batch_is_each_sequence_alone(model: Model) -> None:
    """Sequences of other lengths and other pasts in one step do not touch one another."""
    pasts, news = [[], IDS[:5], [9], IDS], [IDS, [300], [1, 2, 3], [4]]
    caches = [model.new_cache(32) for _ in pasts]
    for cache, past in zip(caches, pasts, strict=True):
        if past:
            model.forward([(cache, past)])
    got = model.forward(list(zip(caches, news, strict=True)))
    for one, cache, past, new in zip(got, caches, pasts, news, strict=True):
        assert close(one, alone(model, past + new)[len(past) :])
        assert cache.length == len(past) + len(new)


def test_last_only_is_the_last_row(model: Model) -> None:
    """One row per sequence, the one that predicts the next id."""
    batch = [IDS, IDS[:3]]
    rows = model.forward([(model.new_cache(), ids) for ids in batch], last_only=True)
    for row, ids in zip(rows, batch, strict=True):
        assert close(row, alone(model, ids)[-1:])


def test_a_cleared_or_truncated_cache_is_as_good_as_a_fresh_one(model: Model) -> None:
    """After clear, and after truncation to a prefix, what follows is computed as if new."""
    cache = model.new_cache()
    model.forward([(cache, IDS[::-1])])
    cache.clear()
    assert close(model.forward([(cache, IDS)])[0], alone(model, IDS))
    cache.truncate(4)
    assert close(model.forward([(cache, [8, 8])])[0], alone(model, [*IDS[:4], 8, 8])[4:])


def test_a_position_offset_matters_only_to_learned_positions(model: Model) -> None:
    """Rotary positions are relative: an offset changes nothing; learned ones are absolute: it must."""
    moved = model.forward([(model.new_cache(offset=9), IDS)])[0]
    same = bool(np.abs(moved - alone(model, IDS)).max() < 1e-9)
    assert same == (model.config["architecture"] == "llama")


STAGES = {
    "llama": "attn_norm q k v q_rope k_rope attn attn_out ffn_in ffn_norm gate up act down out",
    "gpt2": "attn_norm q k v attn attn_out ffn_in ffn_norm up act down out",
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_stage_is_traced_in_order_with_its_shape_and_dtype(path: Path, dtype: Any) -> None:
    """The contract's names, order and shapes; every array has the backend's dtype: nothing is upcast."""
    with Model.load(path, dtype=dtype) as model:
        c, trace = model.config, Trace()
        logits = model.forward([(model.new_cache(), IDS)], lambda name, x: trace.append((name, x)))[0]
        inner = [
            f"blk.{n}.{stage}"
            for n in range(int(c["n_layers"]))
            for stage in STAGES[str(c["architecture"])].split()
        ]
        assert [name for name, _ in trace] == ["embed", *inner, "output_norm", "logits"]
        shapes = {
            "q": (c["n_heads"], c["head_dim"]),
            "k": (c["n_kv_heads"], c["head_dim"]),
            "v": (c["n_kv_heads"], c["head_dim"]),
            "q_rope": (c["n_heads"], c["head_dim"]),
            "k_rope": (c["n_kv_heads"], c["head_dim"]),
            "attn": (int(c["n_heads"]) * int(c["head_dim"]),),
            **dict.fromkeys(("gate", "up", "act"), (c["ffn"],)),
            "logits": (c["vocab_size"],),
        }
        for name, array in trace:
            assert array.shape == (len(IDS), *shapes.get(name.split(".")[-1], (c["width"],))), name
            assert array.dtype == np.dtype(dtype), name
        assert logits.dtype == np.dtype(dtype)
        assert {weight.dtype for weight in model.weights.values()} == {np.dtype(dtype)}
        assert model.new_cache().dtype == np.dtype(dtype)


def test_a_trace_is_a_copy_and_changes_nothing(model: Model) -> None:
    """Traced and untraced logits are the same bits; overwriting what was captured harms nothing."""

    def vandal(name: str, x: Array) -> None:
        x[...] = np.nan

    cache = model.new_cache()
    np.testing.assert_array_equal(model.forward([(cache, IDS)], vandal)[0], alone(model, IDS))
    with pytest.raises(InvalidParameter, match="only one sequence can be traced"):
        model.forward([(model.new_cache(), IDS), (model.new_cache(), IDS)], vandal)


def test_a_stage_can_be_replaced(model: Model) -> None:
    """An array that the trace returns is what every later stage sees; earlier stages stay as they are."""
    plain, moved = dict[str, Array](), dict[str, Array]()
    model.forward([(model.new_cache(), IDS)], plain.__setitem__)
    names = list(plain)
    for target in names:
        wanted = plain[target][::-1].astype(np.float32)

        def trace(name: str, x: Array, target: str = target, wanted: Array = wanted) -> Array | None:
            moved[name] = x
            return wanted if name == target else None

        logits = model.forward([(model.new_cache(), IDS)], trace)[0]
        at = names.index(target)
        assert all((moved[name] == plain[name]).all() for name in names[: at + 1])
        assert np.abs(logits - plain["logits"]).max() > 1e-6, target
    with pytest.raises(InvalidParameter, match=r"blk\.0\.q: wrong shape"):
        model.forward([(model.new_cache(), IDS)], lambda name, x: x[:1] if name == "blk.0.q" else None)


def test_residual_stages_add_up(model: Model) -> None:
    """ffn_in is the block's input plus attn_out, out is ffn_in plus down: the names mean what they say."""
    trace = dict[str, Array]()
    model.forward([(model.new_cache(), IDS)], trace.__setitem__)
    for into, at in (("embed", "blk.0."), ("blk.0.out", "blk.1.")):
        np.testing.assert_allclose(trace[at + "ffn_in"], trace[into] + trace[at + "attn_out"], atol=1e-13)
        np.testing.assert_allclose(trace[at + "out"], trace[at + "ffn_in"] + trace[at + "down"], atol=1e-13)


def test_float32_stays_near_float64_and_rounding_moves_it(path: Path, model: Model) -> None:
    """float32 is within rounding of the oracle; rounded activations are further away, in the lanes' order."""
    oracle = alone(model, IDS)

    def nmse(backend: NumpyBackend) -> float:
        with Model.load(path, backend=backend) as candidate:
            return float(np.sum((alone(candidate, IDS) - oracle) ** 2) / np.sum(oracle**2))

    exact, f16, bf16, q8_0 = (
        nmse(RoundedBackend("float32", kind)) for kind in ("exact", "f16", "bf16", "q8_0")
    )
    assert exact == nmse(NumpyBackend("float32"))
    assert 0 < exact < 1e-11 < f16 < bf16 < 1e-3
    assert 1e-7 < q8_0 < 1e-2


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ([], "no ids"),
        ([1, 320], r"ids\[1\].*0 to 319, got 320"),
        ([-1], r"ids\[0\].*got -1"),
        ([1.5], "not integers"),
    ],
)
def test_bad_ids_are_refused_and_nothing_is_written(model: Model, ids: Any, sentence: str) -> None:
    """One sentence says which id; the other sequences of the batch stay as they were, too."""
    good, bad = model.new_cache(), model.new_cache()
    with pytest.raises(InvalidParameter, match=sentence):
        model.forward([(good, IDS), (bad, ids)])
    assert (good.length, bad.length) == (0, 0)


def test_a_full_cache_is_refused_at_exactly_one_too_many(model: Model) -> None:
    """The context holds exactly its length; one more raises before anything is written, in a batch too."""
    full, other = model.new_cache(), model.new_cache()
    ids = [3] * model.context_length
    assert model.forward([(full, ids)])[0].shape[0] == model.context_length
    with pytest.raises(ContextLengthExceeded, match=r"at most 64 positions, got 64 .* 65 needed"):
        model.forward([(other, IDS), (full, [3])])
    assert (full.length, other.length) == (64, 0)
    with pytest.raises(ContextLengthExceeded, match="65 needed"):
        model.forward([(other, [*ids, 3])])
    assert close(model.forward([(other, IDS)])[0], alone(model, IDS))


def test_caches_that_do_not_belong_are_refused(model: Model) -> None:
    """The same cache twice, another model's, another dtype, a capacity beyond the context, no sequence."""
    cache, (layers, heads, size) = model.new_cache(), model.network.cache_shape
    with pytest.raises(InvalidParameter, match="share a cache"):
        model.forward([(cache, IDS), (cache, IDS)])
    for foreign in (
        KVCache(layers + 1, heads, size, 9, np.float64),
        KVCache(layers, heads, size, 9, np.float32),
    ):
        with pytest.raises(InvalidParameter, match="another model"):
            model.forward([(foreign, IDS)])
    with pytest.raises(InvalidParameter, match="one at least"):
        model.forward([])
    for wrong in (0, 65):
        with pytest.raises(InvalidParameter, match="expected 1 to 64"):
            model.new_cache(wrong)
    with pytest.raises(InvalidParameter, match="expected 1 to 55"):
        model.new_cache(56, offset=9)


def test_a_failing_pass_leaves_the_caches_as_they_were(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the last layer takes back what the first layers wrote."""
    cache = model.new_cache()
    model.forward([(cache, IDS[:4])])
    forward = Network.__call__

    def failing(self: Network, p: Pass) -> Array:
        def until_the_end(name: str, x: Array) -> Array:
            if name == "blk.1.attn_out":
                raise KeyboardInterrupt
            return p.tap(name, x)

        return forward(self, replace(p, tap=until_the_end))

    with monkeypatch.context() as patch:
        patch.setattr(Network, "__call__", failing)
        with pytest.raises(KeyboardInterrupt):
            model.forward([(cache, IDS[4:])])
    assert cache.length == 4
    assert close(model.forward([(cache, IDS[4:])])[0], alone(model, IDS)[4:])


def test_not_a_number_names_the_first_stage(path: Path) -> None:
    """A weight of infinity in layer 1 is blamed on its own stage; the cache is unchanged."""
    with Model.load(path) as model:
        cache = model.new_cache()
        model.weights["blk.1.ffn_up.weight"][3, 5] = np.inf
        with np.errstate(all="ignore"), pytest.raises(NotANumber, match=r"blk\.1\.up: 12 of \d+ values"):
            model.forward([(cache, IDS)])
        assert cache.length == 0


def test_a_closed_model_says_so_and_a_deleted_file_does_not_matter(tmp_path: Path) -> None:
    """Nothing of the file stays open after loading; closing twice is harmless; then every use is refused."""
    path = tiny(tmp_path / "m.gguf")
    model = Model.load(path)
    path.write_bytes(b"")
    path.unlink()
    assert alone(model, IDS).shape == (len(IDS), 320)
    model.close()
    model.close()
    with pytest.raises(UsageError, match="the model is closed"):
        model.new_cache()


def test_two_models_do_not_touch_one_another(tmp_path: Path) -> None:
    """A, then B, then A gives A's bits again; A and B differ."""
    a, b = (Model.load(tiny(tmp_path / f"{seed}.gguf", seed=seed)) for seed in (1, 2))
    first, other, again = alone(a, IDS), alone(b, IDS), alone(a, IDS)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert a.sha256 != b.sha256
    assert a.backend.name == "numpy float32"
