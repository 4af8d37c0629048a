"""The mock engine `control_cuda:leak=KIND,size=N`, which leaks GPU memory as asked, and its cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prill_harness.engines.base import Capability, Engine, EngineInfo, Generation, Session
from prill_harness.leaks.controls.host import ControlSession
from prill_harness.leaks.ledgers.device import TAKE, Driver, take
from prill_harness.leaks.reports.bars import Known
from prill_harness.leaks.reports.report import LeakVerdict
from prill_runtime.errors import InvalidParameter, UsageError

PTX = b""".version 7.0
.target sm_70
.address_size 64
.visible .entry nothing() { ret; }
\0"""
SIZES = (64, 4096, 65536, 2 << 20)
ELSEWHERE = ("graph", "module", "context")
LEAKS = ("none", *TAKE, *ELSEWHERE)
# Graph executables, modules and contexts live in the driver's own memory, and come with host blocks of it.
CASES = (
    *(
        Known(f"{size} bytes of {kind} memory", f"control_cuda:leak={kind},size={size}", (kind,))
        for kind, sizes in (("device", SIZES), ("pinned", (64, 4096)), ("managed", (64, 65536)))
        for size in sizes
    ),
    Known(
        "64 bytes of device memory in every 8th call", "control_cuda:leak=device,size=64,every=8", ("device",)
    ),
    *(Known(f"{kind}s that stay", f"control_cuda:leak={kind}", anywhere=True) for kind in ELSEWHERE),
    Known("nothing, on the device", "control_cuda:leak=none", (), (LeakVerdict.CLEAN,), runs=3),
)


class DeviceControl(Engine, spec="control_cuda"):
    """Every request allocates and frees device memory, and leaks what it is asked to."""

    def __init__(self, kind: str, size: int, every: int) -> None:
        self._kind, self._size, self._every = kind, size, every
        self._driver = Driver(0)
        self._calls = self.sessions = 0

    @classmethod
    def open(cls, argument: str, model: str) -> Engine:
        asked = dict(part.partition("=")[::2] for part in argument.split(",") if part)
        kind = asked.get("leak", "none")
        if kind not in LEAKS:
            raise UsageError("no such device control", where="engine spec", got=repr(argument))
        return cls(kind, int(asked.get("size", "64")), int(asked.get("every", "1")))

    @property
    def info(self) -> EngineInfo:
        offers = {Capability.GENERATE, Capability.SESSIONS, Capability.MEMORY}
        config = {"vocab_size": 1000, "context_length": 256}
        return EngineInfo("control_cuda", "1", "cuda", "none", "", "unknown", frozenset(offers), config)

    def pass_by(self, place: str) -> None:
        """Nothing leaks with a session."""

    def generate(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int,
        on_token: Callable[[int, float], bool | None] | None = None,
        **rest: Any,
    ) -> Generation:
        if not ids:
            raise InvalidParameter("no ids", where="generate")
        self._calls += 1
        self._driver.inside("cuMemFree", take(self._driver, "device", 1 << 16))
        if self._kind != "none" and self._calls % self._every == 0:
            self._leak()
        return Generation(tuple(range(max_tokens)), (-1.0,) * max_tokens, "length")

    def _leak(self) -> None:
        if self._kind in TAKE:
            take(self._driver, self._kind, self._size)
        elif self._kind == "module":
            self._driver.inside("cuModuleLoadData", PTX)
        elif self._kind == "graph":
            graph = self._driver.inside("cuGraphCreate", 0)
            for _ in range(64):
                self._driver.inside("cuGraphAddEmptyNode", graph, None, 0)
            self._driver.inside("cuGraphInstantiate", graph, 0)
            self._driver.inside("cuGraphDestroy", graph)
        else:
            self._context()

    def _context(self) -> None:
        device = self._driver.call("cuDeviceGet", 0)
        try:
            self._driver.call("cuCtxCreate", None, 0, device)  # CUDA 13
        except TypeError:
            self._driver.call("cuCtxCreate", 0, device)
        self._driver.call("cuCtxPopCurrent")

    def session(self, capacity: int | None = None) -> Session:
        return ControlSession(self)

    def memory(self) -> Mapping[str, int]:
        return {"sessions": self.sessions}
