"""Device memory's ledger beside CUPTI's records: all but the driver, on the emulator and a fake CUPTI."""

from __future__ import annotations

import enum
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prill_harness.leaks.ledgers import device
from prill_runtime.device.machine.emulator import EmuDevice
from prill_runtime.errors import Inconclusive

from .fake_cupti import (
    ActivityKind,
    ActivityMemory4,
    ActivityMemoryKind,
    ActivityMemoryOperationType,
    FakeCupti,
)

CI = Path(__file__).resolve().parents[2] / "ci"
sys.path.insert(0, str(CI))
script: Any = importlib.import_module("vram_ledger")
MODEL = "fixture:llama-tiny"


class FakeDriver:
    """Stands for the driver API: gives addresses, tells the fake CUPTI, and holds 500 MB by itself."""

    cupti: FakeCupti
    unseen = False  # the records miss what this driver allocates
    rounds = 1  # the records say a multiple of this many bytes

    def __init__(self, ordinal: int) -> None:
        self.ordinal, self._next = ordinal, 0x7F0000000000
        self._sizes: dict[int, tuple[int, str]] = {}
        self.cupti.allocated(0x100, 4096, "DEVICE")  # the context's own
        self.cupti.allocated(0x200, 64, "DEVICE_STATIC")

    def inside(self, name: str, *arguments: int) -> int | None:
        if name in ("cuMemFree", "cuMemFreeHost"):
            size, kind = self._sizes.pop(arguments[0])
            self.cupti.released(arguments[0], size, kind)
            return None
        kind = {"cuMemAlloc": "DEVICE", "cuMemAllocHost": "PINNED"}[name]
        self._next += 1 << 20
        size = -(-arguments[0] // self.rounds) * self.rounds
        self._sizes[self._next] = size, kind
        if not self.unseen:
            self.cupti.allocated(self._next, size, kind)
        return self._next

    def used(self) -> int:
        return 500_000_000


@pytest.fixture
def cupti(monkeypatch: pytest.MonkeyPatch) -> FakeCupti:
    """A fake CUPTI that hears of the emulator's memory as the real one hears of a GPU's."""
    fake, taken, given = FakeCupti(), EmuDevice.alloc, EmuDevice.free

    def alloc(self: EmuDevice, nbytes: int) -> int:
        pointer = taken(self, nbytes)
        fake.allocated(pointer, nbytes)
        return pointer

    def free(self: EmuDevice, pointer: int) -> None:
        given(self, pointer)
        fake.released(pointer, 0)

    monkeypatch.setattr(EmuDevice, "alloc", alloc)
    monkeypatch.setattr(EmuDevice, "free", free)
    monkeypatch.setattr(device, "import_module", {"cupti.cupti": fake}.__getitem__)
    monkeypatch.setattr(FakeDriver, "cupti", fake, raising=False)
    monkeypatch.setattr(script, "Driver", FakeDriver)
    return fake


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[dict[str, Any]]]:
    code = script.main(["--engine", "emu", "--model", MODEL, "--cycles", "1", *options])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def planted(monkeypatch: pytest.MonkeyPatch, act: Callable[[str, Any], None]) -> None:
    """Something goes wrong just before a moment is looked at; not while the engine warms up."""
    real, seen = script.differences, iter(script.MOMENTS)

    def differences(arena: Any, live: Any, excluded: Any) -> Any:
        act(next(seen), live)
        return real(arena, live, excluded)

    monkeypatch.setattr(script, "differences", differences)


def test_a_sound_engine_agrees_to_the_byte(cupti: FakeCupti, capsys: pytest.CaptureFixture[str]) -> None:
    """At load, request and unload the records are the arena; what is not compared is said in bytes."""
    code, lines = run(capsys, "--cycles", "2")
    assert code == 0, lines
    assert [one["name"] for one in lines] == [f"cycle {n}: {m}" for n in (1, 2) for m in script.MOMENTS]
    assert {one["status"] for one in lines} == {"passed"}
    loaded, asked, gone = lines[:3]
    arena = loaded["figures"]["arena"]
    assert arena > 1 << 20
    assert loaded["figures"]["cupti"]["device"] == {"blocks": 2, "bytes": arena + 4096}
    assert f"{arena:,} bytes of device memory in 1 blocks of the ledger" in loaded["sentence"]
    assert "4,096 bytes device, 0 bytes pinned" in loaded["sentence"]
    assert f"64 bytes static, {500_000_000 - arena - 4096 - 64:,} bytes of the device" in loaded["sentence"]
    assert loaded["figures"]["held"]["weights"] > 0
    assert asked["figures"]["arena"] == arena
    assert gone["figures"]["cupti"]["device"] == {"blocks": 1, "bytes": 4096}


@pytest.mark.parametrize(
    ("wrong", "moment", "words"),
    [
        (("device", 0x5000, 1), "request", "device memory at 0x5000: the ledger has nothing, CUPTI 1 bytes"),
        (("pinned", 0x6000, 8), "load", "pinned memory at 0x6000: the ledger has nothing, CUPTI 8 bytes"),
        (("managed", 0x7000, 9), "unload", "managed memory at 0x7000: the ledger has nothing, CUPTI 9 bytes"),
        (
            ("device", 0x100, 4097),
            "load",
            "device memory at 0x100: the ledger has nothing, CUPTI 4,097 bytes",
        ),
    ],
)
def test_a_block_without_a_ledger_fails(
    cupti: FakeCupti,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    wrong: tuple[str, int, int],
    moment: str,
    words: str,
) -> None:
    """One byte of device memory, a pinned or a managed block, or one from before that grew: named."""
    kind, at, size = wrong
    planted(monkeypatch, lambda name, live: live[kind].update({at: size}) if name == moment else None)
    code, lines = run(capsys)
    bad = [one for one in lines if one["status"] == "failed"]
    assert code == 1
    assert [one["name"] for one in bad] == [f"cycle 1: {moment}"]
    assert bad[0]["sentence"] == words


def test_one_byte_of_difference_fails(
    cupti: FakeCupti, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUPTI has one byte more for the arena's block than the ledger; then no block at all."""

    def grow(name: str, live: Any) -> None:
        at = max(live["device"])
        if name == "load":
            live["device"][at] += 1
        elif name == "request":
            del live["device"][at]

    planted(monkeypatch, grow)
    code, lines = run(capsys)
    assert code == 1
    arena = lines[1]["figures"]["arena"]
    assert f"the ledger has {arena:,} bytes, CUPTI {arena + 1:,} bytes" in lines[0]["sentence"]
    assert f"the ledger has {arena:,} bytes, CUPTI nothing" in lines[1]["sentence"]
    assert lines[2]["status"] == "passed"


def test_an_arena_that_stays_is_found(
    cupti: FakeCupti, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that the driver never got back fails at unload; what stayed of the warm-up is not excused."""
    monkeypatch.setattr(cupti, "released", lambda *a: None if len(a) == 2 else FakeCupti.released(cupti, *a))
    code, lines = run(capsys)
    assert code == 1
    assert lines[0]["name"] == "warm-up"
    assert "was not given back" in lines[0]["sentence"]
    assert lines[-1]["status"] == "failed"


@pytest.mark.parametrize("change", [{"unseen": True}, {"rounds": 512}])
def test_records_that_do_not_see_prove_nothing(
    cupti: FakeCupti,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
) -> None:
    """A block just taken that is not recorded, or not to the byte: inconclusive, no engine is opened."""
    for name, value in change.items():
        monkeypatch.setattr(FakeDriver, name, value)
    code, (only,) = run(capsys)
    assert (code, only["status"]) == (10, "inconclusive")
    assert "CUPTI does not show a block of device memory" in only["sentence"]


def test_without_cupti_or_arena_it_is_inconclusive(
    cupti: FakeCupti, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine on the CPU has no such ledger; a machine without CUPTI cannot compare."""
    code, (only,) = run(capsys, "--engine", "numpy")
    assert (code, only["status"]) == (10, "inconclusive")
    assert "keeps no ledger of device memory" in only["sentence"]
    monkeypatch.setattr(device, "import_module", importlib.import_module)
    monkeypatch.setitem(sys.modules, "cupti", None)
    code, (only,) = run(capsys)
    assert (code, only["status"]) == (10, "inconclusive")
    assert "pip install 'prill[cuda]'" in only["sentence"]


def test_blocks_are_kept_by_address(cupti: FakeCupti) -> None:
    """A release takes the bytes allocated there, whatever it says itself; unknown ones are counted."""
    records = device.Records()
    cupti.allocated(0x10, 100)
    cupti.allocated(0x20, 7, "DEVICE_STATIC")
    cupti.allocated(0x30, 9, "PINNED")
    assert records.now() == {"device": {0x10: 100}, "pinned": {0x30: 9}, "managed": {}, "static": {0x20: 7}}
    cupti.released(0x10, 0)
    cupti.released(0x99, 5)
    assert records.now()["device"] == {}
    assert records.unknown == 1


def test_the_step_passes_lines_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without CUPTI the step of a run on hardware is inconclusive, with one line."""
    hardware, steps = importlib.import_module("hardware"), importlib.import_module("hardware_steps")
    given = ["--engine", "cuda", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    job = importlib.import_module("hardware_job").Job(hardware.arguments(given))
    job.deadline = time.monotonic() + 60
    (tmp_path / "cupti.py").write_text("")  # a module, no package: as good as none
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (only,) = steps.STEPS["ledger"](job)
    assert (only.step, only.name, only.status) == ("ledger", "records", "inconclusive")


@pytest.mark.parametrize("fake", [ActivityKind, ActivityMemoryKind, ActivityMemoryOperationType])
def test_the_fake_is_like_the_real_module(fake: type[enum.IntEnum]) -> None:
    """Where cupti-python is installed (it imports without a driver): its numbers and its record's fields."""
    real = pytest.importorskip("cupti.cupti")
    assert {name: int(getattr(real, fake.__name__)[name]) for name in fake.__members__} == fake.__members__
    assert all(hasattr(real.ActivityMemory4, name) for name in ActivityMemory4.__dataclass_fields__)
    assert all(hasattr(real, name) for name in dir(FakeCupti) if name.startswith("activity_"))


def test_the_arena_tells_its_block() -> None:
    """One block with the bytes the device gave, none once it is closed."""
    from prill_runtime.device.memory.arena import Arena

    emu = EmuDevice()
    arena = Arena(emu, {"weights": 1024, "cache": 512}, None, "m")
    ((at, size),) = arena.blocks().items()
    assert (size, emu.attributes(at)["memory"]) == (1536, "device")
    arena.close()
    assert arena.blocks() == {}


def test_refusals_are_sentences() -> None:
    """Without CUPTI the records say what to install."""
    if importlib.util.find_spec("cupti") is None:
        with pytest.raises(Inconclusive, match=r"not attached.*prill\[cuda\]"):
            device.Records()
