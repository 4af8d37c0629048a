"""A sequence and its last id come in; ids from one captured graph, replayed without the host, go out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from cupel_runtime.adapters.base import Adapter, Step
from cupel_runtime.backends.cuda import SEQUENCE, TOKEN, CudaBackend
from cupel_runtime.backends.device_array import DeviceIds
from cupel_runtime.device_base import Graph
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
    """A graph: embed, every layer, head, choice, next position.

    The fused one serves caches of any capacity; another architecture's, caches up to a power of two.
    Token and position live on the device in a slot that describes the sequence; a replay feeds the token
    there and leaves the next one.
    """

    def __init__(self, adapter: Adapter, ops: CudaBackend) -> None:
        self.adapter, self.ops = adapter, ops
        vocab = adapter.config.vocab_size
        self._slot = ops.block(SEQUENCE.itemsize + 8, "scratch")
        self._ids = ops.block(4 * RING, "scratch")
        self._logprobs = ops.block(4 * RING, "scratch")
        self._partial = ops.block(32 * PARTS, "scratch")
        self.logits = ops.empty(1, vocab, purpose="logits")
        self._graphs: dict[int, Graph] = {}
        self.captured_s = 0.0  # seconds that capturing them took
        self.fused = FusedLlama(adapter, ops) if fits(adapter) else None

    @property
    def _position(self) -> int:
        return self._slot.pointer + SEQUENCE.itemsize

    def graph(self, capacity: int) -> Graph:
        """The graph for caches of up to this capacity, captured on first use."""
        most = self.adapter.config.context_length
        reach = LEAST if self.fused is None else most
        while reach < capacity:
            reach *= 2
        reach = min(reach, max(capacity, most))
        if reach not in self._graphs:
            began = time.perf_counter()
            with self.ops.device.capture() as made:
                self._record(reach)
            self._graphs[reach] = made[0]
            self.captured_s += time.perf_counter() - began
        return self._graphs[reach]

    def _record(self, reach: int) -> None:
        """One decode step, fused where the architecture allows it, else by the adapter's own forward pass."""
        ops, adapter = self.ops, self.adapter
        if self.fused is not None:
            self.fused.record(self._slot, self._position, self.logits)
            self.choose()
            return
        ids = DeviceIds(self._slot, 1, TOKEN)
        positions = DeviceIds(self._slot, 1, SEQUENCE.itemsize)
        cache = SlotCache(ops, adapter.config, reach, self._slot)
        step: Any = Step(ids, positions, ((cache, slice(0, 1)),))  # type: ignore[arg-type]
        hidden: Any = adapter.forward(ops, step, _as_it_is)  # type: ignore[arg-type]
        weight: Any = adapter.head_weight
        ops.linear(hidden, weight, out=self.logits)
        self.choose()

    def choose(self) -> None:
        """Queue the choice of the most probable id, and the step to the next position."""
        vocab = self.adapter.config.vocab_size
        parts = max(1, min(PARTS, vocab // 512))
        args = {"logits": self.logits.pointer, "partial": self._partial.pointer,
                "sequence": self._slot.pointer, "position": self._position, "ids": self._ids.pointer,
                "logprobs": self._logprobs.pointer, "vocab": vocab, "parts": parts, "ring": RING}  # fmt: skip
        self.ops.device.launch("choose_parts", (parts,), 256, args)
        self.ops.device.launch("choose_join", (1,), 32, args)

    def arm(self, cache: DeviceCache, token: int) -> None:
        """Point the slot at a sequence and the id to feed."""
        state = np.zeros(SEQUENCE.itemsize + 8, np.uint8)
        state[: SEQUENCE.itemsize] = cache.record(token).view(np.uint8)
        state[SEQUENCE.itemsize :].view(np.int32)[0] = cache.offset + cache.length
        self.ops.device.upload(self._slot.pointer, state)

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

    Greedy ids are chosen on the device, many replays at a time. Other samplers are computed in float64 on the
    host from downloaded logits, one replay at a time: the device's float32 would not draw the same ids.
    """
    params = params or SamplingParams()
    writer = Writer(model, ids, max_tokens, params, stop, ignore_eos, on_token)
    cache = writer.cache
    assert isinstance(cache, DeviceCache)
    try:
        done = writer.take(model.forward([(cache, writer.feed)], last_only=True)[0][-1])
        greedy = params.temperature == 0 and params.repetition_penalty == 1.0
        while done is None:
            if greedy:
                count = min(RING, writer.remaining, cache.capacity - cache.length)
                if on_token is not None:
                    count = 1
                for token, logprob in zip(*model.decoder.run(cache, writer.feed[0], count), strict=True):
                    cache.length += 1
                    if (done := writer.accept(token, logprob)) is not None:
                        break
            else:
                logits = model.decoder.step(cache, writer.feed[0])
                cache.length += 1
                done = writer.take(logits)
        return done
    finally:
        cache.close()
