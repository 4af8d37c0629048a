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
from cupel_runtime.device_base import Device, Graph, in_turn
from cupel_runtime.device_cache import DeviceCache, SlotCache
from cupel_runtime.errors import NotANumber
from cupel_runtime.fused import FusedLlama, fits
from cupel_runtime.generate import Generation, Writer
from cupel_runtime.ops import Array
from cupel_runtime.sampler import SamplingParams

if TYPE_CHECKING:
    from cupel_runtime.device_model import DeviceModel

RING: Final = 64
"""Tokens that may be queued before the host reads them."""
PARTS: Final = 256  # blocks that look at the logits
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
        self._slot = ops.block(SEQUENCE.itemsize + 8, "scratch")
        self._ids = ops.block(4 * RING, "scratch")
        self._logprobs = ops.block(4 * RING, "scratch")
        self._partial = ops.block(32 * PARTS, "scratch")
        self.logits = ops.empty(1, vocab, purpose="logits")
        self._graphs: dict[tuple[int, bool], Graph] = {}
        self.captured_s = 0.0  # seconds that capturing them took
        self.fused = FusedLlama(adapter, ops) if fits(adapter) else None
        self.sampler = DeviceSampler(ops, vocab, RING)
        # For whom the sampler was armed last, and how many ids of it the sampler remembers.
        self._told: tuple[ref[DeviceCache], SamplingParams, int] | None = None

    @property
    def device(self) -> Device:
        return self.ops.device

    @property
    def _position(self) -> int:
        return self._slot.pointer + SEQUENCE.itemsize

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
                "sequence": self._slot.pointer, "position": self._position, "ids": self._ids.pointer,
                "logprobs": self._logprobs.pointer, "vocab": vocab, "parts": parts, "ring": RING}  # fmt: skip
        self.ops.device.launch("choose_parts", (parts,), 256, args)
        self.ops.device.launch("choose_join", (1,), 32, args)

    def arm(self, cache: DeviceCache, token: int, fed: int = 0) -> None:
        """Point the slot at a sequence and the id to feed, as it stood before its last `fed` positions."""
        record = cache.record(token)
        record["length"] -= fed
        state = np.zeros(SEQUENCE.itemsize + 8, np.uint8)
        state[: SEQUENCE.itemsize] = record.view(np.uint8)
        state[SEQUENCE.itemsize :].view(np.int32)[0] = cache.offset + cache.length - fed
        self.ops.device.upload(self._slot.pointer, state)

    @in_turn
    def run(self, cache: DeviceCache, token: int, count: int) -> tuple[list[int], list[float]]:
        """Feed `token` and go on greedily: the next `count` ids, at most RING, and their logprobs.

        The cache's own count of positions does not move: what the host takes of the result, it counts.

        Raises:
            ContextLengthExceeded: they do not fit. NotANumber: logits that are not finite.
        """
        cache.require(count)
        device = self.ops.device
        graph = self.graph(cache.capacity)
        self.arm(cache, token)
        for _ in range(count):
            graph.replay()
        ids = device.download(self._ids.pointer, (count,), np.int32)
        logprobs = device.download(self._logprobs.pointer, (count,), np.float32)
        state = device.download(self._slot.pointer, (1,), SEQUENCE)[0]
        if state["bad"]:
            raise NotANumber(f"{state['bad']} of {count} rows of logits are not finite", where="logits")
        return ids.tolist(), logprobs.tolist()

    @in_turn
    def first(
        self, cache: DeviceCache, history: Sequence[int], logits: Array, params: SamplingParams
    ) -> tuple[int, float]:
        """The id that follows a prompt, drawn from its last row of logits (vocab,), and its logprob.

        Sorting a large vocabulary on the host takes longer than the row's way back.

        Raises:
            NotANumber: as `sampler.sample`.
        """
        self._tell(params, history, masks=True)
        self.arm(cache, 0, fed=1)
        self.ops.device.upload(self.logits.pointer, np.asarray(logits, np.float32))
        self.sampler.launch(self.logits, self._slot.pointer, self._position)
        ((token,), (logprob,)) = self.sampler.read(1)
        if token < 0:
            raise refusal(token)
        return token, logprob

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

    def _tell(self, params: SamplingParams, history: Sequence[int], masks: bool = False) -> None:
        self._told = None
        self.sampler.arm(params, masks=masks)
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


def _as_it_is(stage: str, x: Any) -> Any:
    return x


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

    Ids are chosen on the device, many replays at a time; the first of a greedy text on the host.
    """
    params = params or SamplingParams()
    writer = Writer(model, ids, max_tokens, params, stop, ignore_eos, on_token)
    cache = writer.cache
    assert isinstance(cache, DeviceCache)
    try:
        greedy = params.temperature == 0 and params.repetition_penalty == 1.0
        logits = model.forward([(cache, writer.feed)], last_only=True)[0][-1]
        if greedy or not writer.remaining:
            done = writer.take(logits)
        else:
            done = writer.accept(*model.decoder.first(cache, writer.history, logits, params))
        while done is None:
            count = min(RING, writer.remaining, cache.capacity - cache.length)
            if on_token is not None:
                count = 1
            if greedy:
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
