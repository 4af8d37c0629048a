"""Device memory: one arena by purpose, a budget before it, a ledger of every byte, nothing outside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prill_fixtures
from prill_runtime.device.machine.emulator import EmuDevice
from prill_runtime.device.memory.arena import (
    Arena,
    NotResident,
    OutOfDeviceMemory,
    Region,
    padded,
    parse_size,
)
from prill_runtime.device.model import DeviceModel, Options
from prill_runtime.errors import InvalidParameter

SIZES = {"weights": 4096, "cache": 8192, "activations": 8192, "scratch": 4096, "logits": 4096}


@pytest.fixture
def device() -> Iterator[EmuDevice]:
    made = EmuDevice()
    yield made
    made.close()


def test_every_byte_is_on_the_ledger(device: EmuDevice) -> None:
    """Blocks count under their purpose as long as they are held, to the byte."""
    arena = Arena(device, SIZES, None, "m")
    a, b = arena.alloc("cache", 1000), arena.alloc("cache", 1)
    assert arena.ledger() == {"weights": 0, "cache": 1001, "activations": 0, "scratch": 0, "logits": 0}
    arena.free(a)
    assert arena.ledger()["cache"] == 1
    arena.free(b)
    assert set(arena.ledger().values()) == {0}


def test_freeing_what_is_not_there_is_an_error(device: EmuDevice) -> None:
    """A pointer goes back once, and only one that was handed out."""
    arena = Arena(device, SIZES, None, "m")
    a = arena.alloc("cache", 100)
    arena.free(a)
    for pointer in (a, a + 1, 0):
        with pytest.raises(InvalidParameter, match="unknown pointer"):
            arena.free(pointer)


def test_the_budget_is_enforced_before_allocating(device: EmuDevice) -> None:
    """The sentence says needed, available, device and model; nothing was allocated."""
    with pytest.raises(
        OutOfDeviceMemory, match=r"tiny.gguf does not fit on emu.*at most 1000 bytes.*28672 bytes needed"
    ):
        Arena(device, SIZES, 1000, "tiny.gguf")
    assert not device._memory


def test_a_purpose_has_no_more_than_its_part(device: EmuDevice) -> None:
    """What does not fit is refused with both numbers, although another purpose has room."""
    arena = Arena(device, SIZES, None, "m")
    with pytest.raises(OutOfDeviceMemory, match="weights do not fit"):
        arena.alloc("weights", 5000)
    assert arena.alloc("cache", 5000)


def test_pointers_must_be_device_memory(device: EmuDevice) -> None:
    """Residency counts what it saw, and refuses a host pointer."""
    arena = Arena(device, SIZES, None, "m")
    pointers = [arena.alloc("cache", 10), arena.alloc("weights", 10)]
    assert arena.require_resident(pointers) == 2
    with pytest.raises(NotResident, match="expected device, got host"):
        arena.require_resident([*pointers, 64])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3000)), max_size=60))
def test_blocks_never_overlap_and_all_comes_back(steps: list[tuple[bool, int]]) -> None:
    """Whatever is allocated and freed: live blocks are apart, and the region is whole at the end."""
    region = Region("cache", 1 << 20, 1 << 15)
    live: dict[int, int] = {}
    for allocate, number in steps:
        if allocate or not live:
            try:
                pointer = region.alloc(number)
            except OutOfDeviceMemory:
                continue
            end = pointer + padded(number)
            assert all(end <= at or at + padded(size) <= pointer for at, size in live.items())
            assert pointer >= 1 << 20
            assert end <= (1 << 20) + (1 << 15)
            live[pointer] = number
        else:
            pointer = sorted(live)[number % len(live)]
            region.free(pointer)
            del live[pointer]
        assert region.held == sum(live.values())
    for pointer in live:
        region.free(pointer)
    assert region.alloc((1 << 15) - 256) == 1 << 20


@pytest.mark.parametrize(
    ("text", "nbytes"), [("2GiB", 2 << 30), ("1.5MiB", 3 << 19), ("64KiB", 65536), ("7", 7)]
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    """Binary units, and plain numbers are bytes."""
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1MiB", "2GB", "1e3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """The sentence names the units."""
    with pytest.raises(InvalidParameter, match="GiB"):
        parse_size(text)


def test_a_model_stays_within_its_estimate_and_gives_everything_back() -> None:
    """Estimate from the file's shapes ≥ ledger; no allocation after load; unload returns to the baseline."""
    device = EmuDevice()
    path = Path(prill_fixtures.path("llama-tiny", "f16"))
    for _ in range(2):
        model = DeviceModel.open(path, Options("emu", positions=256), device)
        assert len(device._memory) == 1
        before = model.memory()
        cache = model.new_cache(100)
        model.forward([(cache, [1, 2, 3])])
        held = model.memory()
        assert held["weights"] == before["weights"] > 5_000_000
        assert held["cache"] == 2 * 4 * 4 * 2 * 64 * 100
        assert held["activations"] == 0
        assert all(held[purpose] <= size for purpose, size in model.estimate.items())
        assert len(device._memory) == 1
        cache.close()
        assert model.memory()["cache"] == 0
        model.close()
        assert not device._memory


def test_a_load_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the budget, or broken half way: the device holds what it held before."""
    device = EmuDevice()
    path = Path(prill_fixtures.path("llama-tiny", "f16"))
    with pytest.raises(
        OutOfDeviceMemory, match=r"llama-tiny.*at most 1\.0 MiB, the budget.*weights 5\.5 MiB"
    ):
        DeviceModel.open(path, Options("emu", budget=1 << 20), device)
    assert not device._memory
    with monkeypatch.context() as patched:
        patched.setattr("prill_runtime.device.model.load_tokenizer", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            DeviceModel.open(path, Options("emu"), device)
    assert not device._memory


@pytest.mark.parametrize(
    ("name", "argument", "expected"),
    [
        ("emu", "", Options("emu")),
        ("cuda", "1", Options("cuda:1")),
        ("cuda", "0,fast,budget=2GiB", Options("cuda:0", "fast", None, 2 << 30)),
        ("emu", "fast,cache=512", Options("emu", "fast", 512)),
    ],
)
def test_engine_arguments_are_taken_apart(name: str, argument: str, expected: Options) -> None:
    """Ordinal, arithmetic, positions and budget, in any order."""
    assert Options.parse(name, argument) == expected


@pytest.mark.parametrize(
    "argument", ["1", "quick", "fast,exact", "cache=0", "cache=x", "budget=much", "size=3"]
)
def test_bad_engine_arguments_are_refused(argument: str) -> None:
    """The emulator has no ordinal; nothing is said twice; numbers are numbers."""
    with pytest.raises(InvalidParameter):
        Options.parse("emu", argument)
