"""A sequence and its last id come in; ids from a captured graph, replayed without the host, go out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

import numpy as np

from cupel_runtime.adapters.base import Adapter, Step
from cupel_runtime.backends.cuda import SEQUENCE, TOKEN, CudaBackend
from cupel_runtime.backends.device_array import DeviceIds
from cupel_runtime.backends.sampling import DeviceSampler, refusal
from cupel_runtime.device_base import Device, Graph, Pointer, in_turn
from cupel_runtime.device_cache import DeviceCache, SlotCache
from cupel_runtime.errors import NotANumber
from cupel_runtime.fused import FusedLlama, fits
from cupel_runtime.generate import Generation, Writer
from cupel_runtime.ops import Array
from cupel_runtime.prefill import Prefill
from cupel_runtime.sampler import SamplingParams

if TYPE_CHECKING:
    from cupel_runtime.device_model import DeviceModel

RING: Final = 64
"""Tokens that may be queued before the host reads them."""
SLOT: Final = np.dtype(
    [("sequence", SEQUENCE), ("position", "<i4"), ("ids", "<i4", RING), ("logprobs", "<f4", RING)]
)
"""What a graph reads and writes of its sequence: where it stands, the next position, what it chose."""
PARTS: Final = 256  # blocks that look at the logits, at most as many as threads of a block
LEAST: Final = 1024  # positions of the smallest graph


class Decoder:
    """Two graphs, one that takes the most probable id and one that draws: embed, every layer, head, choice,
    next position.

    The fused ones serve caches of any capacity; another architecture's, caches up to a power of two.
    Token and position live on the device in a slot that describes the sequence, and so do the settings of the
    draw and the ids the text has used; a replay feeds the token there and leaves the next one.
    """

    def __init__(self, adapter: Adapter, ops: CudaBackend) -> None:
        self.adapter, self.ops = adapter, ops
        vocab = adapter.config.vocab_size
        self._slot = ops.block(SLOT.itemsize, "scratch")
        self._partial = ops.block(32 * PARTS, "scratch")
        self._arrived = ops.block(4, "scratch")
        ops.device.fill(self._arrived.pointer, 4)
        self.logits = ops.empty(1, vocab, purpose="logits")
        self._graphs: dict[tuple[int, bool], Graph] = {}
        self.captured_s = 0.0  # seconds that capturing them took
        self.fused = FusedLlama(adapter, ops) if fits(adapter) else None
        self.sampler = DeviceSampler(ops, vocab, RING)
        self.prompt = Prefill(adapter, ops)
        # For whom the sampler was armed last, and how many ids of it the sampler remembers.
        self._told: tuple[ref[DeviceCache], SamplingParams, int] | None = None

    @property
    def device(self) -> Device:
        return self.ops.device

    @property
    def _position(self) -> int:
        return self._at("position")

    def _at(self, field: str) -> Pointer:
        """Where a field of the slot lies."""
        assert SLOT.fields is not None
        return self._slot.pointer + SLOT.fields[field][1]

    @in_turn
    def graph(self, capacity: int, draws: bool = False) -> Graph:
        """The graph for caches of up to this capacity, captured on first use."""
        most = self.adapter.config.context_length
        reach = LEAST if self.fused is None else most
        while reach < capacity:
            reach *= 2
        reach = min(reach, max(capacity, most))
        if (reach, draws) not in self._graphs:
            began = time.perf_counter()
            with self.ops.device.capture() as made:
                self._record(reach)
                if draws:
                    self.sampler.launch(self.logits, self._slot.pointer, self._position)
                else:
                    self.choose()
            self._graphs[reach, draws] = made[0]
            self.captured_s += time.perf_counter() - began
        return self._graphs[reach, draws]

    def _record(self, reach: int) -> None:
        """One step up to the logits: fused where the architecture allows it, else the adapter's own pass."""
        ops, adapter = self.ops, self.adapter
        if self.fused is not None:
            self.fused.record(self._slot, self._position, self.logits)
            return
        ids = DeviceIds(self._slot, 1, TOKEN)
        positions = DeviceIds(self._slot, 1, SEQUENCE.itemsize)
        cache = SlotCache(ops, adapter.config, reach, self._slot)
        step: Any = Step(ids, positions, ((cache, slice(0, 1)),))  # type: ignore[arg-type]
        hidden: Any = adapter.forward(ops, step, _as_it_is)  # type: ignore[arg-type]
        weight: Any = adapter.head_weight
        ops.linear(hidden, weight, out=self.logits)

    def choose(self) -> None:
        """Queue the choice of the most probable id, and the step to the next position."""
        vocab = self.adapter.config.vocab_size
        parts = max(1, min(PARTS, vocab // 512))
        args = {"logits": self.logits.pointer, "partial": self._partial.pointer,
                "arrived": self._arrived.pointer, "sequence": self._slot.pointer,
                "position": self._position, "ids": self._at("ids"), "logprobs": self._at("logprobs"),
                "vocab": vocab, "ring": RING}  # fmt: skip
        self.ops.device.launch("choose", (parts,), 256, args)

    def arm(self, cache: DeviceCache, token: int, fed: int = 0) -> None:
        """Point the slot at a sequence and the id to feed, as it stood before its last `fed` positions."""
        state = np.zeros(1, SLOT)
        state["sequence"] = cache.record(token)
        state["sequence"]["length"] -= fed
        state["position"] = cache.offset + cache.length - fed
        self.ops.device.upload(self._slot.pointer, state)

    @in_turn
    def first(self, cache: DeviceCache, history: Sequence[int], params: SamplingParams) -> tuple[int, float]:
        """The id that follows a prompt whose last row of logits is in `logits`, and its logprob.

        Raises:
            NotANumber: as `run`, or as `refusal`.
        """
        self.arm(cache, 0, fed=1)
        if is_greedy(params):
            self.choose()
            ids, logprobs = self._chosen(1)
        else:
            self._tell(params, history)
            self.sampler.launch(self.logits, self._slot.pointer, self._position)
            ids, logprobs = self.sampler.read(1)
            if ids[0] < 0:
                raise refusal(ids[0])
        return ids[0], logprobs[0]

    @in_turn
    def run(self, cache: DeviceCache, token: int, count: int) -> tuple[list[int], list[float]]:
        """Feed `token` and go on greedily: the next `count` ids, at most RING, and their logprobs.

        The cache's own count of positions does not move: what the host takes of the result, it counts.

        Raises:
            ContextLengthExceeded: they do not fit. NotANumber: logits that are not finite.
        """
        cache.require(count)
        graph = self.graph(cache.capacity)
        self.arm(cache, token)
        for _ in range(count):
            graph.replay()
        return self._chosen(count)

    def _chosen(self, count: int) -> tuple[list[int], list[float]]:
        """What `choose` left in the ring since the slot was armed."""
        slot = self.device.download(self._slot.pointer, (1,), SLOT)[0]
        if bad := slot["sequence"]["bad"]:
            raise NotANumber(f"{bad} of {count} rows of logits are not finite", where="logits")
        return slot["ids"][:count].tolist(), slot["logprobs"][:count].tolist()

    @in_turn
    def draw(
        self, cache: DeviceCache, history: Sequence[int], count: int, params: SamplingParams
    ) -> tuple[list[int], list[float]]:
        """As `run`, for the text `history`, whose last id is fed; ids are drawn by `params`.

        A row that was refused has in the place of its id what `refusal` takes; nothing behind it counts.

        Raises:
            ContextLengthExceeded: they do not fit.
        """
        cache.require(count)
        graph = self.graph(cache.capacity, draws=True)
        if self._told != (ref(cache), params, len(history)):
            self._tell(params, history)
        self._told = ref(cache), params, len(history) + count
        self.arm(cache, history[-1])
        for _ in range(count):
            graph.replay()
        return self.sampler.read(count)

    def _tell(self, params: SamplingParams, history: Sequence[int]) -> None:
        self._told = None
        self.sampler.arm(params)
        if params.repetition_penalty != 1.0:
            self.sampler.remember(history)

    @in_turn
    def step(self, cache: DeviceCache, token: int) -> Array:
        """Feed one id; logits (vocab,) of what follows. The cache's count of positions does not move.

        Raises:
            As `run`.
        """
        self.run(cache, token, 1)
        return self.ops.device.download(self.logits.pointer, (self.logits.shape[1],), np.float32)

    def close(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs = {}
        self.prompt.close()


def _as_it_is(stage: str, x: Any) -> Any:
    return x


def is_greedy(params: SamplingParams) -> bool:
    """Whether the most probable id is taken as the logits stand."""
    return params.temperature == 0 and params.repetition_penalty == 1.0


def generate(
    model: DeviceModel,
    ids: Sequence[int],
    *,
    max_tokens: int,
    params: SamplingParams | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    on_token: Callable[[int, float], bool | None] | None = None,
) -> Generation:
    """As `cupel_runtime.generate.generate`, decoding by graph.

    Ids are chosen on the device, many replays at a time; logits do not come to the host.
    """
    params = params or SamplingParams()
    writer = Writer(model, ids, max_tokens, params, stop, ignore_eos, on_token)
    cache = writer.cache
    assert isinstance(cache, DeviceCache)
    try:
        done = _begin(model, writer, cache, params)
        while done is None:
            count = min(RING, writer.remaining, cache.capacity - cache.length)
            if on_token is not None:
                count = 1
            if is_greedy(params):
                chosen = model.decoder.run(cache, writer.feed[0], count)
            else:
                chosen = model.decoder.draw(cache, writer.history, count, params)
            for token, logprob in zip(*chosen, strict=True):
                if token < 0:
                    raise refusal(token)
                cache.length += 1
                if (done := writer.accept(token, logprob)) is not None:
                    break
        return done
    finally:
        cache.close()


def _begin(
    model: DeviceModel, writer: Writer, cache: DeviceCache, params: SamplingParams
) -> Generation | None:
    """The prompt, and the id that follows it.

    Raises:
        NotANumber: the first stage that is not finite, as `Model.forward` finds it.
    """
    with model.device.turn:  # from the logits to the choice: they lie in the decoder's own memory
        model.prefill(cache, writer.feed)
        try:
            chosen = model.decoder.first(cache, writer.history, params)
        except NotANumber:
            cache.truncate(0)
            model.forward([(cache, writer.feed)], last_only=True)
            raise
    return writer.spent() or writer.accept(*chosen)
