"""A model in a device's memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import clear_frames
from typing import Any, Final

import numpy as np

from prill_runtime.device.machine.base import in_turn
from prill_runtime.device.machine.cuda import Device, open_device
from prill_runtime.device.memory.arena import Arena, parse_size
from prill_runtime.device.memory.matrix import DeviceMatrix
from prill_runtime.device.ops.backend import CudaBackend
from prill_runtime.device.plan import DevicePlan, plan
from prill_runtime.device.steps.cache import DeviceCache
from prill_runtime.device.steps.decode import Decoder
from prill_runtime.device.steps.prefill import MAX_ROWS
from prill_runtime.device.steps.step import run
from prill_runtime.errors import InvalidParameter
from prill_runtime.gguf.file import open_gguf
from prill_runtime.models import load as models
from prill_runtime.models import walks
from prill_runtime.models.base import Step, Tap
from prill_runtime.models.cache import KVCache
from prill_runtime.ops.protocol import Array, Ids
from prill_runtime.run.model import Model, Trace, checked_ids
from prill_runtime.tokenizer.load import load_tokenizer

MODES: Final = ("exact", "fast")
PHASES: Final = ("init", "module load", "upload and repack")


@dataclass(frozen=True)
class Options:
    """The options of an engine on a device: `[ORDINAL][,exact|fast][,cache=POSITIONS][,budget=SIZE]`.

    Attributes:
        device: its spec. mode: arithmetic. positions: of all caches together, None: decided by the model.
        budget: most bytes of device memory, None: all that is free.
    """

    device: str
    mode: str = "exact"
    positions: int | None = None
    budget: int | None = None

    @classmethod
    def parse(cls, name: str, argument: str) -> Options:
        """Raises InvalidParameter for anything unknown or repeated."""
        found: dict[str, str] = {}
        for part in filter(None, argument.split(",")):
            key, _, value = part.partition("=")
            if not value:
                key, value = ("mode", part) if part in MODES else ("ordinal", part)
            wrong = key == "ordinal" and (name == "emu" or not value.isdecimal())
            if key in found or wrong or key not in ("mode", "ordinal", "cache", "budget"):
                raise InvalidParameter(
                    "bad engine argument", where=f"{name}:{argument}",
                    expected="[ORDINAL][,exact|fast][,cache=POSITIONS][,budget=SIZE]", got=repr(part),
                )  # fmt: skip
            found[key] = value
        positions = found.get("cache")
        if positions is not None and not (positions.isdecimal() and int(positions)):
            raise InvalidParameter(
                "bad engine argument", where="cache", expected="positions", got=repr(positions)
            )
        return cls(
            device=f"{name}:{found['ordinal']}" if "ordinal" in found else name,
            mode=found.get("mode", "exact"),
            positions=None if positions is None else int(positions),
            budget=parse_size(found["budget"]) if "budget" in found else None,
        )


class DeviceModel(Model):
    """A Model whose weights, caches and activations lie in one arena of a device."""

    backend: Any  # a CudaBackend, whose arrays behave like NumPy's as far as the nodes need

    @classmethod
    def open(cls, path: str | Path, options: Options, device: Device | None = None) -> DeviceModel:
        """Read a GGUF file into device memory.

        Raises:
            OutOfDeviceMemory: before anything is allocated.
            ModelFileError, UnsupportedModel: as `Model.load`.
        """
        with open_gguf(path) as file:
            network, names = models.examine(file)
            tensors = {name: file.tensors[name] for name in names}
            planned = plan(network, tensors, options.mode, options.positions, str(file.path))
            owned = device is None
            marks = [time.perf_counter()]
            arena = None
            # The digest of a large file takes longer than the rest; both only read, so they run side by side.
            with ThreadPoolExecutor(1) as beside:
                digest = beside.submit(lambda: file.sha256)
                try:
                    device = device or open_device(options.device)
                    arena = Arena(device, planned.sizes, options.budget, Path(path).name)
                    marks.append(time.perf_counter())
                    backend: Any = CudaBackend(device, arena, options.mode)
                    marks.append(time.perf_counter())
                    wired, report = models.load(file, backend)
                    device.synchronize()
                    marks.append(time.perf_counter())
                    tokenizer = load_tokenizer(file.metadata, wired.network.vocab)
                    arena.require_resident(pointers(wired.weights))
                    backend.prepare(walks.rotations(wired.network, wired.weights))
                except BaseException:
                    file.close()  # which ends the digest too, so that the error need not wait for it
                    if arena is not None:
                        arena.close()
                    if owned and device is not None:
                        device.close()
                    raise
            model = cls(wired, backend, tokenizer, report, digest.result())
            model.phases = dict(zip(PHASES, np.diff(marks).tolist(), strict=True))
            model.options, model.plan = options, planned
            model._owned, model._decoder = owned, None
            return model

    options: Options
    plan: DevicePlan
    phases: dict[str, float]
    _owned: bool
    _decoder: Decoder | None

    @property
    def device(self) -> Device:
        device: Device = self.backend.device
        return device

    @property
    def estimate(self) -> Mapping[str, int]:
        """Planned bytes of the arena, by purpose."""
        return self.plan.sizes

    @property
    def most_rows(self) -> int:
        """The most rows of one step."""
        return min(MAX_ROWS, self.plan.rows)

    @property
    def arithmetic(self) -> str:
        """The arithmetic whose lane bounds its results."""
        if self.options.mode == "exact":
            return "float32"
        kinds = {w.kind for w in self.weights.values() if isinstance(w, DeviceMatrix)}
        return "half" if kinds <= {"f32", "f16", "bf16"} else "int8"

    @property
    def captured(self) -> Decoder | None:
        """The decoder; None before the first text was continued."""
        return self._decoder

    @property
    def decoder(self) -> Decoder:
        """Captured graphs that continue one sequence token by token."""
        with self.device.turn:
            if self._decoder is None:
                self._decoder = Decoder(self.wired, self.backend)
            return self._decoder

    def new_cache(self, capacity: int | None = None, offset: int = 0) -> DeviceCache:
        room = self.context_length - offset
        capacity = room if capacity is None else capacity
        if not 1 <= capacity <= room:
            raise InvalidParameter("out of range", where="capacity", expected=f"1 to {room}", got=capacity)
        return DeviceCache(self.backend, self.network, capacity, offset)

    @in_turn
    def forward(
        self,
        batch: Sequence[tuple[KVCache, Sequence[int]]],
        trace: Trace | None = None,
        *,
        last_only: bool = False,
    ) -> list[Array]:
        rows = sum(len(ids) for _, ids in batch)
        if rows <= self.most_rows:
            return super().forward(batch, trace, last_only=last_only)
        if trace is not None:
            raise InvalidParameter(
                "too long to be traced", where="trace", expected=f"at most {self.most_rows} ids", got=rows
            )
        with _all_or_nothing(batch):
            return [self._in_pieces(cache, ids, last_only) for cache, ids in batch]

    @in_turn
    def prefill(self, cache: DeviceCache, ids: Sequence[int]) -> None:
        """Append ids to a sequence's cache and leave the logits of the last in the decoder's memory.

        They are not checked for NaN or infinity here, but when an id is chosen from them.

        Raises:
            ContextLengthExceeded, InvalidParameter: as `forward`, before anything is written.
        """
        checked = checked_ids(ids, self.vocab_size)
        with _all_or_nothing([(cache, checked)]):
            for piece in self.pieces(checked):
                self.decoder.prompt.feed(cache, piece)
            self.decoder.prompt.head(self.decoder.logits)

    def pieces(self, ids: Sequence[int] | Ids) -> list[Any]:
        """The ids of one sequence in pieces of at most `most_rows`."""
        most = self.most_rows
        return [ids[low : low + most] for low in range(0, len(ids), most)] or [ids]

    def _in_pieces(self, cache: KVCache, ids: Sequence[int], last_only: bool) -> Array:
        """Logits of one sequence whose new ids take several steps."""
        done = [
            super(DeviceModel, self).forward([(cache, piece)], last_only=last_only)[0]
            for piece in self.pieces(ids)
        ]
        return done[-1] if last_only else np.concatenate(done)

    def _run(self, step: Step, wanted: Ids | None, tap: Tap) -> Array:
        try:
            return run(self.wired, self.backend, step, wanted, tap)
        except BaseException as error:
            clear_frames(error.__traceback__)  # an error that is kept must not keep activations alive
            raise

    def memory(self) -> dict[str, int]:
        """Bytes held on the device, by purpose; empty once the model is closed."""
        return {} if self._wired is None else self.backend.arena.ledger()

    def close(self) -> None:
        if self._wired is not None:
            if self._decoder is not None:
                self._decoder.close()
            self.device.synchronize()
            super().close()
            self.backend.arena.close()
            if self._owned:
                self.device.close()


@contextmanager
def _all_or_nothing(batch: Sequence[tuple[KVCache, Sequence[int] | Ids]]) -> Iterator[None]:
    """Take new ids in several steps; if one fails, every cache is cut back to the length it had.

    Raises:
        ContextLengthExceeded: some do not fit, before anything is written.
    """
    for cache, ids in batch:
        cache.rollback()
        cache.require(len(ids))
    lengths = [cache.length for cache, _ in batch]
    try:
        yield
    except BaseException:
        for (cache, _), length in zip(batch, lengths, strict=True):
            cache.truncate(length)
        raise


def pointers(weights: Mapping[str, Any]) -> list[int]:
    """Every address from which a forward pass reads weights."""
    found = []
    for weight in weights.values():
        found += list(weight.pointers.values()) if isinstance(weight, DeviceMatrix) else [weight.pointer]
    return found


__all__ = ["DeviceModel", "Options"]
