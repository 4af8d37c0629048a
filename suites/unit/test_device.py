"""The device layer: compiled kernels, launches, graphs, and what it says when something is missing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from prill_runtime.device.machine import compile as kernels
from prill_runtime.device.machine import formats
from prill_runtime.device.machine.cuda import CudaDevice, open_device
from prill_runtime.device.machine.emulator import EmuDevice
from prill_runtime.errors import EngineError, Inconclusive, InvalidParameter, UsageError

NVCC = shutil.which("nvcc")
ADD = {"x": 0, "y": 0, "out": 0, "count": 0, "width": 0, "pitch": 0}


@pytest.fixture
def device() -> Iterator[EmuDevice]:
    made = EmuDevice()
    made.module("elementwise")
    yield made
    made.close()


def add(device: EmuDevice, x: int, y: int, out: int, count: int) -> None:
    device.launch("add", (-(-count // 256),), 256, ADD | {"x": x, "y": y, "out": out, "count": count})


def floats(device: EmuDevice, values: list[float]) -> int:
    pointer = device.alloc(4 * len(values))
    device.upload(pointer, np.array(values, np.float32))
    return pointer


def test_a_launch_runs_the_kernel(device: EmuDevice) -> None:
    """Arguments go in by name, results come back by copy."""
    x, y, out = floats(device, [1, 2, 3]), floats(device, [10, 20, 30]), device.alloc(12)
    add(device, x, y, out, 3)
    assert device.download(out, (3,), np.float32).tolist() == [11, 22, 33]


def test_fresh_memory_is_not_a_number(device: EmuDevice) -> None:
    """What nobody wrote is NaN, so that reading it shows."""
    assert np.isnan(device.download(device.alloc(64), (16,), np.float32)).all()


@pytest.mark.parametrize(
    ("kernel", "grid", "block", "args", "says"),
    [
        ("subtract", (1,), 32, ADD, "no such kernel"),
        ("add", (1,), 32, {"x": 0}, "wrong arguments"),
        ("add", (1,), 32, ADD | {"z": 1}, "wrong arguments"),
        ("add", (0,), 32, ADD, "wrong launch shape"),
        ("add", (1,), 257, ADD, "wrong launch shape"),
    ],
)
def test_a_wrong_launch_is_refused(
    device: EmuDevice, kernel: str, grid: tuple[int], block: int, args: dict[str, int], says: str
) -> None:
    """Unknown kernels, fields that are missing or too many, and shapes no kernel takes."""
    with pytest.raises(InvalidParameter, match=says):
        device.launch(kernel, grid, block, args)


def test_a_graph_replays_its_launches_in_order(device: EmuDevice) -> None:
    """x += 1; y += x, captured once: nothing runs then, and three replays give 1+2+3."""
    x, one, y = floats(device, [0]), floats(device, [1]), floats(device, [0])
    with device.capture() as made:
        add(device, x, one, x, 1)
        add(device, y, x, y, 1)
    assert device.download(y, (1,), np.float32)[0] == 0
    for _ in range(3):
        made[0].replay()
    assert device.download(y, (1,), np.float32)[0] == 6
    assert made[0].nodes == 2


def test_nothing_but_launches_inside_a_capture(device: EmuDevice) -> None:
    """Allocation and copies inside a capture are errors, and the device works afterwards."""
    x = floats(device, [1])
    for call in (
        lambda: device.alloc(4),
        lambda: device.download(x, (1,), np.float32),
        lambda: floats(device, [1]),
    ):
        with pytest.raises(EngineError, match="inside a capture"), device.capture():
            call()
    assert device.download(x, (1,), np.float32)[0] == 1


def test_unknown_pointers_are_refused(device: EmuDevice) -> None:
    """A pointer can be freed once, and copies stay inside allocations."""
    x = floats(device, [1, 2])
    with pytest.raises(EngineError, match="outside device memory"):
        device.download(x, (3,), np.float32)
    device.free(x)
    with pytest.raises(InvalidParameter, match="unknown pointer"):
        device.free(x)


def test_a_barrier_not_everybody_reaches_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A return before a barrier is an error with the kernel's name, not a hang."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path))
    broken = kernels.source("softmax").replace(
        "    top = block_max(top, shared);",
        "    if (threadIdx.x == 7) return;\n    top = block_max(top, shared);",
    )
    original = kernels.source
    monkeypatch.setattr(kernels, "source", lambda name: broken if name == "softmax" else original(name))
    device = EmuDevice()
    device.module("softmax")
    x, out = floats(device, [1.0] * 256), device.alloc(1024)
    with pytest.raises(EngineError, match="softmax: not every thread reached"):
        device.launch("softmax", (1,), 256, {"x": x, "out": out, "width": 256})


def test_processes_that_compile_at_once_share_one_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Four builds at once leave one library and no half-written file."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: kernels.build("elementwise", kernels.KernelTarget("emu")), range(4)))
    assert len(paths) == 1
    left = sorted(path.suffix for path in (tmp_path / "kernels").iterdir())
    assert left == [".lock", ".sha256", ".so"]


def test_the_cache_key_follows_source_flags_and_headers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another flag, another text or another header is another file."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path))
    target = kernels.KernelTarget("emu")
    plain, flagged = kernels.build("softmax", target), kernels.build("softmax", target, ("-DX",))
    source, headers = kernels.source, kernels.headers
    monkeypatch.setattr(kernels, "source", lambda name: source(name) + "// edited\n")
    edited = kernels.build("softmax", target)
    monkeypatch.setattr(kernels, "source", source)
    monkeypatch.setattr(kernels, "headers", lambda: headers() | {"other.cuh": ""})
    assert len({plain, flagged, edited, kernels.build("softmax", target)}) == 4


def test_a_compiler_that_is_missing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nvcc the sentence says how to get it."""
    kernels.compiler.cache_clear()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match=r"nvcc is not on the PATH.*CUDA toolkit") as caught:
        kernels.build("softmax", kernels.KernelTarget("sm_90"))
    kernels.compiler.cache_clear()
    assert caught.value.exit_code == 4


def test_a_refused_kernel_shows_the_compilers_first_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The sentence quotes the compiler, and nothing stays in the cache."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path))
    monkeypatch.setattr(
        kernels, "source", lambda name: '#include "common.cuh"\nint f() { return nowhere; }\n'
    )
    with pytest.raises(kernels.CompilerMissing, match=r"refused softmax.cu.*nowhere"):
        kernels.build("softmax", kernels.KernelTarget("emu"))
    assert not list((tmp_path / "kernels").glob("*.so"))


@pytest.mark.parametrize("spec", ["gpu", "emu:1", "cuda:x", "cuda:-1"])
def test_unknown_devices_are_refused(spec: str) -> None:
    """The sentence lists the devices there are."""
    with pytest.raises(UsageError, match="cuda, cuda:N or emu"):
        open_device(spec)


def test_a_machine_without_a_gpu_is_inconclusive_or_lacks_a_package() -> None:
    """`cuda` fails in one sentence that says what to do: exit 10 without a GPU, 4 without PyCUDA."""
    with pytest.raises((Inconclusive, UsageError)) as caught:
        CudaDevice(99)
    assert caught.value.exit_code in (4, 10)
    assert "\n" not in str(caught.value)


def test_every_kernel_names_a_readable_struct() -> None:
    """Layouts are read from the sources: all kernels, all fields, C alignment."""
    found = {name: kernels.signatures(name) for name in kernels.names()}
    assert set(found["matvec"]) == {f"matvec_{kind}" for kind in formats.VALUES + formats.BLOCKS}
    layout = found["matvec"]["matvec_q8_0"].layout
    assert layout["m"].names == ("q", "h", "s", "d", "rows", "cols", "pitch", "blocks")
    assert (layout.fields or {})["x"][1] == 48
    assert all(signature.layout.names for each in found.values() for signature in each.values())


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("name", ["norm", "attention_decode"])
def test_kernels_compile_for_hopper_without_spills(name: str, tmp_path: Path) -> None:
    """nvcc takes the kernel as it stands and keeps every value in registers; `make kernels` checks all."""
    from prill_runtime.device.machine.spills import spills

    assert spills(name, "sm_90") == {}
