"""The plan of a device's arena: it bounds what any step takes, and is not much more than that."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prill_fixtures.synth import SHAPES
from prill_runtime.device import plan as plans
from prill_runtime.device.machine.dry import DryDevice
from prill_runtime.device.memory.arena import Arena, OutOfDeviceMemory
from prill_runtime.device.model import DeviceModel, Options
from prill_runtime.device.ops.backend import CudaBackend
from prill_runtime.device.ops.tensor_cores import LEAST_TILE_ROWS
from prill_runtime.device.plan import plan
from prill_runtime.device.steps.cache import MOST_SESSIONS
from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.models import walks
from prill_runtime.models.load import Wired
from prill_runtime.models.nodes.network import Network
from prill_runtime.sampling.sampler import SamplingParams

from .networks import network

WIDTHS = (16, 32, 48, 96, 100, 256, 288, 512)
FFNS = (16, 32, 80, 96, 768, 1536)
VOCABULARIES = (1, 2, 7, 320, 4099, 32_000, 200_000)
CONTEXTS = (8, 9, 64, 255, 1025, 4096)
DIMS = (16, 32, 48, 64, 80, 128, 256)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Sizes of sound models of both families: small, and large beside one another."""
    llama = draw(st.booleans())
    kv_heads, dim = draw(st.integers(1, 4)), draw(st.sampled_from(DIMS))
    heads = kv_heads * (draw(st.sampled_from([1, 2, 3, 8])) if llama else 1)
    return network(
        "llama" if llama else "gpt2",
        vocab=draw(st.sampled_from(VOCABULARIES)),
        layers=draw(st.integers(1, 5)),
        width=draw(st.sampled_from(WIDTHS)) if llama else heads * dim,
        heads=heads,
        kv_heads=kv_heads,
        size=dim,
        ffn=draw(st.sampled_from(FFNS)),
        context=draw(st.sampled_from(CONTEXTS)),
        tied=draw(st.booleans()),
    )


def tensors_of(made: Network, type: T) -> dict[str, TensorInfo]:
    """A file's tensors without their bytes: matrices of one type where their rows are whole blocks."""
    tensors = {}
    for name, tensor in walks.tensors(made).items():
        weights, _ = gguf.GGML_QUANT_SIZES[type]
        kind = type if len(tensor.shape) > 1 and tensor.shape[-1] % weights == 0 else T.F32
        tensors[name] = TensorInfo(name, tensor.shape, kind)
    return tensors


def dry(made: Network, mode: str = "exact", type: T = T.F16, positions: int | None = None) -> DeviceModel:
    """The model of these sizes in an arena as planned, on a device that does nothing."""
    tensors = tensors_of(made, type)
    planned = plan(made, tensors, mode, positions, "dry.gguf")
    device = DryDevice()
    ops: Any = CudaBackend(device, Arena(device, planned.sizes, None, "dry"), mode)
    weights = {name: ops.place(info) for name, info in tensors.items()}
    tokenizer: Any = SimpleNamespace(eog_ids=(), piece=lambda token: b"x")
    model = DeviceModel(Wired(made, weights), ops, tokenizer, None, "")  # type: ignore[arg-type]
    model.options, model.plan = Options("dry", mode), planned
    model._owned, model._decoder = True, None
    ops.prepare(walks.rotations(made, weights))
    return model


def batch(model: DeviceModel, lengths: Sequence[int]) -> list[tuple[Any, list[int]]]:
    return [(model.new_cache(length), [0] * length) for length in lengths]


def last_only(config: Network, rows: int) -> bool:
    """Whether the logits of all rows would be more than a test wants to hold: some chunks are enough."""
    return rows * config.vocab > 1 << 23


@settings(max_examples=15, deadline=None)
@given(
    networks(), st.sampled_from(["exact", "fast"]), st.sampled_from([T.F16, T.Q8_0, T.Q4_K, T.F32]), st.data()
)
def test_no_step_takes_more_than_was_planned(
    config: Network, mode: str, type: T, data: st.DataObject
) -> None:
    """Any shape, arithmetic and order of steps: prompts, batches up to 64, both at once, texts, traces.

    The arena holds what was planned and refuses more, so a plan that is too small is an error here.
    """
    model, context = dry(config, mode, type), config.context
    length = (st.integers(1, context) | st.sampled_from([1, 16, 17, 200, 1024, context])).map(
        lambda n: min(n, context)
    )
    kinds = st.lists(st.sampled_from(["batch", "text", "trace", "session"]), min_size=1, max_size=4)
    kept: list[Any] = []
    for kind in data.draw(kinds):
        if kind == "batch":
            lengths = data.draw(st.lists(length, min_size=1, max_size=64))
            room = plans.positions_of(config) - sum(cache.capacity for cache in kept)
            fit = [n for n, end in zip(lengths, np.cumsum(lengths), strict=True) if end <= room] or [1]
            model.forward(batch(model, fit), last_only=last_only(config, sum(fit)))
        elif kind == "text":
            prompt = [0] * min(data.draw(length), context - 1)
            params = SamplingParams(temperature=data.draw(st.sampled_from([0.0, 1.0])))
            for _ in range(2):  # the second time from a captured graph
                cache = model.new_cache(len(prompt) + 1)
                model.prefill(cache, prompt)
                model.decoder.first(cache, prompt, params)
                assert len(list(model.decoder.stream(cache, [*prompt, 0], 1, params))) == 1
        elif kind == "trace":
            chosen = random.Random(data.draw(st.integers(0, 99)))
            rows = min(data.draw(length), model.most_rows, max(1, (1 << 23) // config.vocab))
            model.forward(
                batch(model, [rows]), lambda stage, x, chosen=chosen: x if chosen.random() < 0.5 else None
            )
        elif len(kept) < 8:
            kept.append(model.new_cache(data.draw(length)))
            model.forward([(kept[-1], [0] * min(kept[-1].capacity, 5))], last_only=True)
            going_on = [(cache, [0]) for cache in kept if cache.length < cache.capacity]
            model.forward([*going_on, *batch(model, [1])], last_only=True)
        assert model.memory()["activations"] == 0
    peaks = {purpose: region.peak for purpose, region in model.backend.arena.regions.items()}
    assert min(peaks["weights"], peaks["cache"], peaks["activations"], peaks["scratch"], peaks["logits"]) > 0


@settings(max_examples=15, deadline=None)
@given(networks(), st.sampled_from(["exact", "fast"]), st.lists(st.integers(2, 99), min_size=1, max_size=9))
def test_places_for_n_rows_are_n_times_those_for_few(config: Network, mode: str, lengths: list[int]) -> None:
    """What is rehearsed with a few rows is true of many, to the byte: of one sequence and of a batch.

    In `fast`, for sequences of enough rows for the tensor cores, and for those of fewer in a larger batch.
    """
    # The arena is made for 64 sequences of the whole context, and never asked for more.
    assume(sum(lengths) + LEAST_TILE_ROWS * len(lengths) <= 64 * config.context)
    model, ops = dry(config, mode), dry(config, mode).backend
    for least in (2, LEAST_TILE_ROWS) if mode == "fast" else (2,):
        few = [n for n in lengths if n < LEAST_TILE_ROWS] or [least - 1, 1] if least == 2 else lengths
        many = [n + least for n in few] if least == LEAST_TILE_ROWS else few
        if mode == "exact" or (least == 2 and 1 < sum(many) < LEAST_TILE_ROWS):
            expected = plans.rehearsed(ops, model.wired, (1, 1) if len(many) > 1 else (2,), plans.copied)
        elif least == LEAST_TILE_ROWS:
            expected = plans.rehearsed(ops, model.wired, (LEAST_TILE_ROWS,) * min(len(many), 2), plans.copied)
        else:
            continue
        assert plans.rehearsed(ops, model.wired, tuple(many), plans.copied) == expected


def test_the_shape_of_a_story_model_fits() -> None:
    """A vocabulary of 32,000 beside a width of 288: all rows of a whole context, in both arithmetics."""
    for mode in ("exact", "fast"):
        model = dry(
            network(vocab=32_000, layers=6, width=288, heads=6, kv_heads=6, size=48, ffn=768, context=256),
            mode,
            T.Q8_0,
        )
        assert model.forward(batch(model, [256]))[0].shape == (256, 32_000)
        assert model.backend.arena.regions["logits"].peak > 16_000_000


def test_a_sequence_opened_during_a_step_is_in_nobodys_way() -> None:
    """Another thread opens one while attention runs: the next, longer prompt finds its sums in one piece."""
    model = dry(network(layers=1, heads=8, kv_heads=8, context=4096))
    device: Any = model.device
    opened: list[Any] = []

    def launch(kernel: str, *rest: Any, **named: Any) -> None:
        if kernel == "attention_split":
            opened.append(model.new_cache(1))

    device.launch = launch
    for rows in (256, 512, 1024):
        cache = model.new_cache()
        cache.commit(cache.capacity - rows)
        model.forward([(cache, [0] * rows)], last_only=True)
    assert len(opened) >= 3
    scratch = model.backend.arena.regions["scratch"]
    assert scratch.peak > 0.9 * scratch.size  # so that a second piece of this size has no room


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("name", ["llama-1b", "llama-8b"])
def test_a_plan_is_no_more_than_twice_what_is_used(name: str, mode: str) -> None:
    """Of activations and logits at real shapes, what whole prompts and texts take is half at least."""
    s = SHAPES[name]
    config = network(
        s.architecture, vocab=s.vocab, layers=s.layers, width=s.width, heads=s.heads, kv_heads=s.kv_heads,
        size=s.head_dim, ffn=s.ffn, context=s.context, tied=s.tied, rope__freq_base=s.rope_base,
    )  # fmt: skip
    model = dry(config, mode, T.Q8_0)
    cache = model.new_cache()
    model.prefill(cache, [0] * model.most_rows)
    model.forward(batch(model, [100]))
    for purpose in ("activations", "logits"):
        region = model.backend.arena.regions[purpose]
        assert region.size < 2 * region.peak, purpose
        assert region.peak <= region.size


def test_a_step_of_more_rows_than_planned_is_refused() -> None:
    """The plan is what holds a step back: with less room than it took, it is out of memory."""
    model = small()
    lengths = [64] * (model.plan.rows // 64)
    model.forward(batch(model, lengths))
    used = model.backend.arena.regions["activations"].peak
    assert used > model.plan.sizes["activations"] / 2
    smaller = {**model.plan.sizes, "activations": used - 256}
    model.backend.arena = Arena(DryDevice(), smaller, None, "dry")
    with pytest.raises(OutOfDeviceMemory, match="activations do not fit"):
        model.forward(batch(model, lengths))


def small(positions: int | None = None) -> DeviceModel:
    return dry(network(), positions=positions)


def test_an_error_that_is_kept_keeps_no_activation() -> None:
    """Whoever holds on to a failed pass's error holds none of the device's memory."""
    model = small()

    def wrong(stage: str, x: np.ndarray) -> None:
        if stage == "blk.1.act":
            raise ValueError(stage)

    with pytest.raises(ValueError, match="act") as caught:
        model.forward(batch(model, [40]), wrong)
    assert caught.value.__traceback__ is not None
    assert model.memory()["activations"] == 0


def test_more_sequences_than_there_is_room_for_is_one_sentence() -> None:
    """In positions and sequences, with what to do; nothing is taken, and one that closes makes room."""
    model = small(positions=100)
    held = [model.new_cache(50)]
    with pytest.raises(OutOfDeviceMemory) as caught:
        held += (model.new_cache(64) for _ in range(99))
    said = str(caught.value)
    positions = sum(cache.capacity for cache in held)
    assert positions > 100 - 64
    assert "no room for another sequence: expected at most" in said
    assert (
        f"beside {positions} positions in {len(held)} open sequences, got 64 positions; close a sess" in said
    )
    assert "cache=POSITIONS" in said
    assert model.memory()["cache"] == sum(cache.nbytes for cache in held)
    held.pop().close()
    assert model.new_cache(50).capacity == 50


def test_more_sequences_than_are_counted_is_one_sentence() -> None:
    """A thousand sequences are open at once; where their number is too large, the sentence says so."""
    model, held = small(positions=5000), []
    held += [model.new_cache(1) for _ in range(MOST_SESSIONS)]
    with pytest.raises(OutOfDeviceMemory, match=r"too many sequences are open at once: .*got \d+; close one"):
        model.new_cache(1)
    model.forward([(cache, [0]) for cache in held[:64]])
    list(map(type(held[0]).close, held))
    assert model.memory()["cache"] == 0
    assert model.new_cache(64).capacity == 64


@given(st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_sequences_that_come_and_go_leave_room_for_prompts_and_texts(seed: int) -> None:
    """Whatever was opened, closed and first used in between: nothing that stays lies in the way of a step."""
    chosen, model, held = random.Random(seed), small(positions=2000), []
    for _ in range(120):
        if held and chosen.random() < 0.45:
            held.pop(chosen.randrange(len(held))).close()
        elif sum(cache.capacity for cache in held) < 1000:
            held.append(model.new_cache(chosen.choice([1, 1, 2, 30])))
        if chosen.random() < 0.05:
            cache = model.new_cache(64)
            model.prefill(cache, [0] * 40)
            model.forward([(cache, [0] * 20)])
            cache.close()
    assert model.memory()["cache"] == sum(cache.nbytes for cache in held)


def test_results_of_a_batch_are_one_array() -> None:
    """Attention of each sequence writes its rows of one block, and joining them moves and takes nothing."""
    ops = small().backend
    region = ops.arena.regions["activations"]
    q = ops.empty(10, 2, 16)
    parts = [q[rows].beside(32) for rows in (slice(0, 3), slice(3, 4), slice(4, 10))]
    blocks = region.live
    joined = ops.concatenate(parts)
    assert (region.live, blocks) == (2, 2)
    assert [part.pointer - joined.pointer for part in parts] == [0, 3 * 128, 4 * 128]
    assert joined.shape == (10, 32)
    assert ops.concatenate([parts[1], parts[0]]).allocation is not joined.allocation
    del parts, joined
    assert region.live == 1
    assert q[0:3].beside(32).allocation is not q.allocation


def test_a_batch_is_joined_without_a_copy() -> None:
    """Nothing is copied to join what a batch's sequences attended to."""
    model, copies = small(), []
    device: Any = model.device
    device.launch = lambda kernel, *rest, **named: copies.append(kernel) if kernel == "copy_rows" else None
    model.forward(batch(model, [3, 1, 7]))
    assert not copies
