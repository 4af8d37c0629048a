"""A model file, loaded: logits of any batch of sequences, for prefill and decoding alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from prill_runtime.errors import InvalidParameter, NotANumber, UsageError
from prill_runtime.gguf.file import open_gguf
from prill_runtime.models import load as models
from prill_runtime.models import walks
from prill_runtime.models.base import Step, Tap, Value, untouched
from prill_runtime.models.cache import KVCache
from prill_runtime.models.load import LoadReport, Wired
from prill_runtime.models.nodes.network import Network
from prill_runtime.ops.numpy import NumpyBackend, Precision
from prill_runtime.ops.protocol import Array, Backend, Ids
from prill_runtime.run.generate import Generation, generate, generate_batch
from prill_runtime.tokenizer.load import Tokenizer, load_tokenizer

__all__ = ["Generation", "KVCache", "Model", "generate", "generate_batch"]

# Called with a copy of every stage; an array that it returns replaces the stage for the rest of the pass.
Trace = Callable[[str, Array], Array | None]


def require_loadable(path: str | Path) -> None:
    """Refuse every file that `Model.load` would refuse, without reading its weights.

    Raises:
        ModelFileError, UnsupportedModel: as Model.load.
    """
    with open_gguf(path) as file:
        network, _ = models.examine(file)
        load_tokenizer(file.metadata, network.vocab)


class Model:
    """One file on one backend; a context manager.

    Attributes:
        config: the configuration that the forward pass uses, by name.
        report: what loading found. sha256: of the file.
    """

    def __init__(
        self, wired: Wired, backend: Backend, tokenizer: Tokenizer, report: LoadReport, sha256: str
    ) -> None:
        self._wired: Wired | None = wired
        self.backend = backend
        self.tokenizer = tokenizer
        self.report = report
        self.sha256 = sha256

    @classmethod
    def load(cls, path: str | Path, *, dtype: Precision = "float32", backend: Backend | None = None) -> Model:
        """Read a GGUF file and close it again. `backend` is used instead of NumpyBackend(dtype).

        Raises:
            ModelFileError: the file is malformed, or its metadata and tensors do not make a model.
            UnsupportedModel: an architecture, tensor type or tokenizer that is not implemented.
        """
        ops = backend or NumpyBackend(dtype)
        with open_gguf(path) as file:
            wired, report = models.load(file, ops)
            tokenizer = load_tokenizer(file.metadata, wired.network.vocab)
            return cls(wired, ops, tokenizer, report, file.sha256)

    @property
    def wired(self) -> Wired:
        """The nodes and their weights.

        Raises:
            UsageError: the model is closed.
        """
        if self._wired is None:
            raise UsageError("the model is closed", where="Model", hint="load it again")
        return self._wired

    @property
    def network(self) -> Network:
        """What the model is made of; raises UsageError as `wired`."""
        return self.wired.network

    @property
    def weights(self) -> dict[str, Array]:
        """The weights by name, as the backend holds them; raises UsageError as `wired`."""
        return self.wired.weights

    @property
    def config(self) -> dict[str, Value]:
        return walks.effective(self.network)

    @property
    def vocab_size(self) -> int:
        return self.network.vocab

    @property
    def context_length(self) -> int:
        return self.network.context

    def new_cache(self, capacity: int | None = None, offset: int = 0) -> KVCache:
        """An empty cache for one sequence; capacity in positions, up to the context length when None.

        Raises:
            InvalidParameter: a capacity below one, or offset + capacity above the context length.
        """
        room = self.context_length - offset
        capacity = room if capacity is None else capacity
        if not 1 <= capacity <= room:
            raise InvalidParameter("out of range", where="capacity", expected=f"1 to {room}", got=capacity)
        return KVCache(*self.network.cache_shape, capacity, self.backend.dtype, offset)

    def forward(
        self,
        batch: Sequence[tuple[KVCache, Sequence[int]]],
        trace: Trace | None = None,
        *,
        last_only: bool = False,
    ) -> list[Array]:
        """One step for a batch of sequences of any lengths: each has its new ids appended to its cache.

        Args:
            batch: a cache and its new ids, per sequence. trace: gets every stage's name and a copy of its
                array, in execution order, of one sequence; what it returns, if anything, takes the stage's
                place. last_only: logits of the last new id alone.

        Returns:
            Logits (new ids, vocab) per sequence, in the backend's dtype; row i predicts what follows id i.

        Each new id is multiplied by each weight once, whatever its position and whatever else is in the
        batch, and by the head only if its logits are wanted; the caches are read in place.

        Raises:
            ContextLengthExceeded: before anything is written.
            InvalidParameter: no sequence, no ids, an id outside the vocabulary, a cache twice or of another
                model, a trace of several sequences, a replacement of another shape.
            NotANumber: the first stage that is not finite; the caches are as before the call.
        """
        step = self._step(batch)
        if trace is not None and len(batch) != 1:
            raise InvalidParameter("only one sequence can be traced", where="trace", got=f"{len(batch)}")
        last = np.array([rows.stop - 1 for _, rows in step.sequences])
        try:
            logits = self._run(step, last if last_only else None, _tracing(trace) if trace else untouched)
            if not np.isfinite(logits).all():
                self._find_not_finite(step)
        except BaseException:
            for cache, _ in step.sequences:
                cache.rollback()
            raise
        for cache, _ in step.sequences:
            cache.commit()
        return np.split(logits, np.arange(1, len(batch)) if last_only else last[:-1] + 1)

    def close(self) -> None:
        """Release the weights; calling it twice is harmless."""
        self._wired = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, step: Step, wanted: Ids | None, tap: Tap) -> Array:
        p, network = self.wired.passing(self.backend, step, tap), self.network
        hidden = network(p)
        return network.head(p, hidden if wanted is None else hidden[wanted])

    def _find_not_finite(self, step: Step) -> None:
        """Run the step once more and stop at the first stage that is not finite."""
        for cache, _ in step.sequences:
            cache.rollback()

        def tap(stage: str, x: Array) -> Array:
            if not np.isfinite(x).all():
                wrong = int(np.count_nonzero(~np.isfinite(x)))
                raise NotANumber(f"{wrong} of {x.size} values are not finite", where=stage)
            return x

        self._run(step, None, tap)
        raise NotANumber("logits were not finite, and finite when computed again", where="logits")

    def _step(self, batch: Sequence[tuple[KVCache, Sequence[int]]]) -> Step:
        """The batch, checked, as one step whose rows follow one another."""
        shape = self.network.cache_shape
        if not batch:
            raise InvalidParameter("no sequence", where="batch", expected="one at least")
        if len({id(cache) for cache, _ in batch}) != len(batch):
            raise InvalidParameter("two sequences share a cache", where="batch")
        sequences, all_ids, positions, low = [], [], [], 0
        for cache, new in batch:
            ids = checked_ids(new, self.vocab_size)
            made_for = (cache.shape[0], cache.shape[1], cache.shape[3])
            if made_for != shape or cache.dtype != self.backend.dtype:
                raise InvalidParameter("the cache belongs to another model", where="batch", got=made_for)
            cache.rollback()
            cache.require(len(ids))
            first = cache.position
            sequences.append((cache, slice(low, low + len(ids))))
            all_ids.append(ids)
            positions.append(np.arange(first, first + len(ids)))
            low += len(ids)
        return Step(np.concatenate(all_ids), np.concatenate(positions), tuple(sequences))


def checked_ids(ids: Sequence[int], vocab_size: int) -> Ids:
    """Ids as an array (row,).

    Raises:
        InvalidParameter: none at all, not integers, or an id outside the vocabulary.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or not array.size:
        raise InvalidParameter("no ids", where="ids", expected="a sequence of at least one", got=array.shape)
    if array.dtype.kind not in "iu":
        raise InvalidParameter("not integers", where="ids", expected="token ids", got=str(array.dtype))
    wrong = (array < 0) | (array >= vocab_size)
    if wrong.any():
        at = int(wrong.argmax())
        raise InvalidParameter(
            "id outside the vocabulary", where=f"ids[{at}]", expected=f"0 to {vocab_size - 1}", got=array[at]
        )
    return array.astype(np.int64)


def _tracing(trace: Trace) -> Tap:
    def tap(stage: str, x: Array) -> Array:
        instead = trace(stage, x.copy())
        if instead is None:
            return x
        if instead.size != x.size:
            raise InvalidParameter(
                "wrong shape of a replacement", where=stage, expected=x.shape, got=instead.shape
            )
        return instead.astype(x.dtype).reshape(x.shape)

    return tap
