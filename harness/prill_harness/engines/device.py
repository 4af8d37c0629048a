"""The runtime's CUDA engine, on a GPU or on the CPU emulator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.base import Capability, Engine, EngineInfo
from prill_harness.engines.embedded import Embedded, EmbeddedSession, anonymous_bytes
from prill_harness.engines.models import resolve_model
from prill_harness.version import version
from prill_runtime.device.machine.cuda import copy_bandwidth
from prill_runtime.device.memory.arena import PURPOSES, Arena
from prill_runtime.device.model import DeviceModel, Options
from prill_runtime.device.ops.backend import CudaBackend
from prill_runtime.device.steps.decode import generate
from prill_runtime.errors import EngineError
from prill_runtime.ops.protocol import Backend

CHECKED_BYTES = 64 << 20  # of each purpose, for checks of single ops


class DeviceSession(EmbeddedSession):
    """One sequence whose cache lies in the arena."""

    @property
    def nbytes(self) -> int:
        return 0 if self._cache is None else self._cache.nbytes


class OnDevice(Embedded):
    """DeviceModel behind the engine protocol.

    The argument is `[ORDINAL][,exact|fast][,cache=POSITIONS][,budget=SIZE]`, as in `cuda:1,fast`.
    """

    device_name: ClassVar[str]
    _continue = staticmethod(generate)
    _apart: CudaBackend | None = None  # what `ops` returned

    def __init__(self, model: DeviceModel, spec: str) -> None:
        self._model: DeviceModel | None = model
        self._sessions: WeakSet[EmbeddedSession] = WeakSet()
        self._info = EngineInfo(
            name=f"{self.device_name}-{model.options.mode}",
            version=version(),
            device=model.device.name,
            model=spec,
            model_sha256=model.sha256,
            arithmetic=model.arithmetic,
            capabilities=frozenset(Capability),
            config=dict(model.config),
        )

    @classmethod
    def accepts(cls, argument: str) -> None:
        Options.parse(cls.device_name, argument)

    @classmethod
    def open(cls, argument: str, model: str) -> Engine:
        options = Options.parse(cls.device_name, argument)
        return cls(DeviceModel.open(resolve_model(model), options), model)

    @property
    def model(self) -> DeviceModel:
        """The runtime's model. Raises EngineError once the engine is closed."""
        if self._model is None:
            raise EngineError("engine is closed", expected="an open engine", hint="open it again")
        return self._model

    # One text after the other, through the captured graphs, as any text is written here: there are no graphs
    # for several sequences. `logits_batch` does compute them together.
    generate_batch = Engine.generate_batch

    def trace(
        self, ids: Sequence[int], replace: Mapping[str, NDArray[np.float64]] | None = None
    ) -> Iterator[tuple[str, NDArray[np.floating]]]:
        """As the protocol says; a prompt longer than one step is traced piece by piece."""
        taken: dict[str, list[NDArray[np.floating]]] = {}
        cache, low = self._cache_for(ids), 0
        for piece in self.model.pieces(ids):
            high = low + len(piece)
            rows = slice(low, high if high < len(ids) else None)  # a prompt that is too long fails at the end

            def keep(
                stage: str, array: NDArray[np.floating], rows: slice = rows
            ) -> NDArray[np.floating] | None:
                taken.setdefault(stage, []).append(array)
                return replace[stage][rows] if replace and stage in replace else None

            self.model.forward([(cache, piece)], trace=keep)
            low = high
        return iter([(stage, np.concatenate(arrays)) for stage, arrays in taken.items()])

    def ops(self) -> Backend[Any]:
        """The model's ops in its arithmetic, on an arena of their own, for the model's is full."""
        if self._apart is None:
            device, sizes = self.model.device, dict.fromkeys(PURPOSES, CHECKED_BYTES)
            self._apart = CudaBackend(
                device, Arena(device, sizes, None, "the checks of ops"), self.model.options.mode
            )
        return self._apart

    def close(self) -> None:
        if self._apart is not None:
            self._apart.arena.close()
            self._apart = None
        super().close()

    def phases(self) -> Mapping[str, float]:
        decoder = self.model.captured
        return self.model.phases | ({} if decoder is None else {"capture": decoder.captured_s})

    def copy_bandwidth(self) -> float | None:
        """None if two blocks of COPY_BYTES are not free."""
        return copy_bandwidth(self.model.device)

    def memory(self) -> Mapping[str, int]:
        """Bytes held on the device now, by purpose, from the arena's ledger; `process` is this process's."""
        held = {} if self._model is None else self._model.memory()
        return {"weights": 0, "cache": 0} | held | {"process": anonymous_bytes()}

    def session(self, capacity: int | None = None) -> DeviceSession:
        session = DeviceSession(self.model, capacity)
        self._sessions.add(session)
        return session


class Cuda(OnDevice, spec="cuda"):
    """On a GPU."""

    device_name = "cuda"


class Emu(OnDevice, spec="emu"):
    """The same kernels, thread by thread, on the CPU."""

    device_name = "emu"
