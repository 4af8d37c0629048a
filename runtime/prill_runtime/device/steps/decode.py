"""Decoding by captured graphs: many tokens in a row without the host."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Final, Protocol
from weakref import ref

from prill_runtime.device.machine.base import Device, Graph, in_turn
from prill_runtime.device.memory.array import DeviceIds
from prill_runtime.device.memory.slot import TOKEN_OFFSET, Slot
from prill_runtime.device.ops.backend import CudaBackend
from prill_runtime.device.ops.sampler import DeviceSampler, refusal
from prill_runtime.device.steps.cache import DeviceCache
from prill_runtime.device.steps.lower import Lowered
from prill_runtime.device.steps.prefill import Prefill, in_memory
from prill_runtime.errors import NotANumber
from prill_runtime.models.load import Wired
from prill_runtime.run.generate import Generation, Predictor, Writer
from prill_runtime.sampling.sampler import SamplingParams

QUEUED_TOKENS: Final = 16
"""Tokens queued at a time; more are queued before the host reads these, so that the device never waits."""
TURN_TOKENS: Final = 256
"""Tokens after which other threads get their turn."""
BATCHES_AHEAD: Final = 2  # batches of tokens queued at once, no more than the ring holds
CHOICE_BLOCKS: Final = 256  # thread blocks that read the logits, at most as many as threads of a block
LEAST_REACH: Final = 1024  # positions of the smallest graph


class Decoder:
    """Two kinds of graph, one that takes the most probable id and one that draws. Each is a whole step:
    embedding, every layer, head, choice, next position.

    If attention is fused, a graph serves caches of any capacity, else caches up to a power of two. Token and
    position live on the device in a slot that describes the sequence, and so do the sampling parameters and
    the ids used so far; a replay feeds the token in the slot and puts the next one there.
    """

    def __init__(self, model: Wired, ops: CudaBackend) -> None:
        self.model, self.ops = model, ops
        vocab = model.network.vocab
        self._slot = Slot(ops.device, ops.arena)
        self._partial = ops.allocate(32 * CHOICE_BLOCKS, "scratch")
        self._arrived = ops.allocate(4, "scratch")
        ops.device.fill(self._arrived.pointer, 4)
        self.logits = ops.empty(1, vocab, purpose="logits")
        self._graphs: dict[tuple[int, bool], Graph] = {}
        self.captured_s = 0.0  # seconds that capturing them took
        self.lowered = Lowered(model, ops)
        self.sampler = DeviceSampler(ops, vocab)
        self.prompt = Prefill(model, ops)
        # The text that the sampler was armed for last, and how many of its ids the sampler remembers.
        self._told: tuple[ref[DeviceCache], SamplingParams, int] | None = None

    @property
    def device(self) -> Device:
        return self.ops.device

    @in_turn
    def graph(self, capacity: int, draws: bool = False) -> Graph:
        """The graph for caches of up to this capacity, captured on first use."""
        most = self.model.network.context
        reach = most if self.lowered.any_reach else LEAST_REACH
        while reach < capacity:
            reach *= 2
        reach = min(reach, max(capacity, most))
        if (reach, draws) not in self._graphs:
            began = time.perf_counter()
            with self.ops.device.capture() as made:
                self._record(reach)
                if draws:
                    self.sampler.launch(self.logits, self._slot)
                else:
                    self.choose()
            self._graphs[reach, draws] = made[0]
            self.captured_s += time.perf_counter() - began
        return self._graphs[reach, draws]

    def _record(self, reach: int) -> None:
        """Queue one step up to the logits, with attention over `reach` positions."""
        slot = self._slot
        ids = DeviceIds(slot.allocation, 1, TOKEN_OFFSET)
        positions = DeviceIds(slot.allocation, 1, slot.at("position") - slot.pointer)
        self.lowered(in_memory(self.model, self.ops, slot.allocation, ids, positions, reach), self.logits)

    def choose(self) -> None:
        """Queue the choice of the most probable id; it also moves the slot to the next position."""
        vocab = self.model.network.vocab
        parts = max(1, min(CHOICE_BLOCKS, vocab // 512))
        args = {"logits": self.logits.pointer, "partial": self._partial.pointer,
                "arrived": self._arrived.pointer, "vocab": vocab, **self._slot.targets}  # fmt: skip
        self.ops.device.launch("choose", (parts,), 256, args)

    @in_turn
    def first(self, cache: DeviceCache, history: Sequence[int], params: SamplingParams) -> tuple[int, float]:
        """The id that follows a prompt whose last row `prefill` has left in `logits`, and its logprob.

        Raises:
            NotANumber: logits that are not finite, or as `refusal`.
        """
        # A choice moves on from the row it was made from, and the cache has counted that row already.
        self._slot.arm(cache.record(length=cache.length - 1))
        if is_greedy(params):
            self.choose()
        else:
            self._tell(params, history)
            self.sampler.launch(self.logits, self._slot)
        ((token,), (logprob,)) = self._slot.read(0, 1)
        if token < 0:
            raise refusal(token)
        return token, logprob

    def stream(
        self, cache: DeviceCache, history: Sequence[int], count: int, params: SamplingParams
    ) -> Generator[tuple[int, float], None, None]:
        """Feed the last id of `history` and go on: the next `count` ids, each with its logprob.

        An id's row is committed to the cache when the id is yielded. The device's turn is held until the last
        of them, or until the iterator is closed; steps that are queued by then still run.

        Raises:
            ContextLengthExceeded: they do not fit.
            NotANumber, EngineError: as `refusal`, in the place of the id of the row that was refused.
        """
        cache.require(count)
        with self.device.turn:
            draws = not is_greedy(params)
            graph = self.graph(cache.capacity, draws)
            if draws:
                if self._told != (ref(cache), params, len(history)):
                    self._tell(params, history)
                # True once all are read; closing the stream earlier ends the text, and its cache with it.
                self._told = ref(cache), params, len(history) + count
            self._slot.arm(cache.record(history[-1]))
            left, queued = count, deque[tuple[int, int, int]]()
            while left or queued:
                while left and len(queued) < BATCHES_AHEAD:
                    some, at = min(QUEUED_TOKENS, left), count - left
                    for _ in range(some):
                        graph.replay()
                    queued.append((at, some, self.device.mark()))
                    left -= some
                for token, logprob in zip(*self._slot.read(*queued.popleft()), strict=True):
                    if token < 0:
                        raise refusal(token)
                    cache.commit(1)
                    yield token, logprob

    def _tell(self, params: SamplingParams, history: Sequence[int]) -> None:
        self._told = None
        self.sampler.arm(params)
        if params.repetition_penalty != 1.0:
            self.sampler.remember(history)

    def close(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs = {}
        self.prompt.close()


def is_greedy(params: SamplingParams) -> bool:
    """Whether the most probable id of the unchanged logits is taken."""
    return params.temperature == 0 and params.repetition_penalty == 1.0


class DevicePredictor(Predictor, Protocol):
    """The part of a DeviceModel that continuing a text needs."""

    @property
    def device(self) -> Device: ...

    @property
    def decoder(self) -> Decoder: ...

    def prefill(self, cache: DeviceCache, ids: Sequence[int]) -> None:
        """Append ids to a sequence's cache, and leave the logits of the last with the decoder."""
        ...


def generate(
    model: DevicePredictor,
    ids: Sequence[int],
    *,
    max_tokens: int,
    params: SamplingParams | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    on_token: Callable[[int, float], bool | None] | None = None,
) -> Generation:
    """As `prill_runtime.run.generate.generate`, but decoding by graph.

    Ids are chosen on the device, many replays at a time; logits are not copied to the host.
    """
    params = params or SamplingParams()
    writer = Writer(model, ids, max_tokens, params, stop, ignore_eos, on_token)
    cache = writer.cache
    assert isinstance(cache, DeviceCache)
    try:
        if (done := _begin(model, writer, cache, params)) is not None:
            return done
        while True:
            # A caller who is told of every token may do anything between two of them.
            span = TURN_TOKENS if on_token is None else 1
            count = min(span, writer.remaining, cache.capacity - cache.length)
            with closing(model.decoder.stream(cache, writer.history, count, params)) as stream:
                for token, logprob in stream:
                    if (done := writer.accept(token, logprob)) is not None:
                        return done
    finally:
        cache.close()


def _begin(
    model: DevicePredictor, writer: Writer, cache: DeviceCache, params: SamplingParams
) -> Generation | None:
    """Feed the prompt and accept the id that follows it.

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
