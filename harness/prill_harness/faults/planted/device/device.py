"""Faults that only a device can have: launch shapes, barriers, strides, memory handed out twice, draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE

LAUNCH = "prill_runtime.device.machine.base:Device.launch"
SOURCE = "prill_runtime.device.machine.compile:source"


def _launch(kernel: str, change: Callable[[list[int], dict[str, Any]], None]) -> Patch:
    """Change grid or arguments of the launches of kernels whose names begin so."""

    def wrap(launch: Any) -> Any:
        def other(self: Any, name: str, grid: Any, block: Any, args: Any, shared: int = 0) -> None:
            shape, fields = list(grid), dict(args)
            if name.startswith(kernel):
                change(shape, fields)
            launch(self, name, shape, block, fields, shared)

        return other

    return Patch(LAUNCH, wrap)


def source(file: str, old: str, new: str) -> Patch:
    """Compile a kernel file with one piece of its text replaced."""

    def wrap(source: Any) -> Any:
        def other(name: str) -> str:
            text: str = source(name)
            if name == file and old not in text:
                raise AssertionError(f"{file}.cu no longer holds {old!r}")
            return text.replace(old, new) if name == file else text

        return other

    return Patch(SOURCE, wrap)


@fault(area="device", blames=("q",), models=ONE, engine="emu")
def device_wrong_grid() -> Iterator[Patch]:
    """A tiled product is launched with one block of outputs too few."""

    def change(grid: list[int], args: dict[str, Any]) -> None:
        grid[0] = max(1, grid[0] - 1)

    yield _launch("matmul", change)


@fault(area="device", blames=("q",), models=ONE, engine="emu")
def device_missing_barrier() -> Iterator[Patch]:
    """A tiled product reads its tiles before every thread has written them."""
    yield source(
        "matmul",
        "        __syncthreads();\n#pragma unroll\n        for (int k = 0; k < DEPTH",
        "#pragma unroll\n        for (int k = 0; k < DEPTH",
    )


@fault(area="device", blames=("q_rope", "k_rope"), needs=("rope",), engine="emu")
def device_wrong_stride() -> Iterator[Patch]:
    """Rotation steps from row to row by one head too few."""

    def change(grid: list[int], args: dict[str, Any]) -> None:
        args["x_pitch"] -= args["head_dim"]

    yield _launch("rope", lambda grid, args: change(grid, args) if "x_pitch" in args else None)


@fault(area="device", blames=("q_rope", "k_rope"), needs=("rope",), engine="emu")
def device_positions_left_over() -> Iterator[Patch]:
    """The table of angles is one row short, so the last row reads what lay there before."""

    def change(grid: list[int], args: dict[str, Any]) -> None:
        args["rows"] = max(1, args["rows"] - 1)

    yield _launch("rope_angles", change)


@fault(area="device", blames=("embed", "attn_norm", "q", "k", "v"), engine="emu")
def device_stale_slot() -> Iterator[Patch]:
    """Memory of activations goes back to the arena while it is still read."""

    def wrap(block: Any) -> Any:
        def early(self: Any, nbytes: int, purpose: str = "activations", **how: Any) -> Any:
            made = block(self, nbytes, purpose, **how)
            if purpose == "activations" and nbytes > 4096:  # rows, not the ids that say which
                self.arena.free(made.pointer)
                made._free = lambda pointer: None
            return made

        return early

    yield Patch("prill_runtime.device.ops.backend:CudaBackend.allocate", wrap)


@fault(area="device", blames=("state",), engine="emu")
def device_position_not_told() -> Iterator[Patch]:
    """The device is told only once where a sequence stands, so later rows overwrite earlier ones."""

    def wrap(arm: Any) -> Any:
        def once(self: Any) -> None:
            if not self.length:
                arm(self)

        return once

    yield Patch("prill_runtime.device.steps.cache:DeviceCache.arm", wrap)


@fault(area="device", blames=("attn",), models=ONE, engine="emu")
def device_split_lost() -> Iterator[Patch]:
    """The combination of partial attention leaves out the first split."""
    yield source(
        "attention",
        "for (int s = first; s <= last; ++s) top",
        "for (int s = first + (last > first); s <= last; ++s) top",
    )
    yield source(
        "attention",
        "for (int s = first; s <= last; ++s) sum",
        "for (int s = first + (last > first); s <= last; ++s) sum",
    )
    yield source(
        "attention",
        "for (int s = first; s <= last; ++s) mixed",
        "for (int s = first + (last > first); s <= last; ++s) mixed",
    )


@fault(area="device", blames=("sampler",), models=ONE, engine="emu")
def device_draw_position_shifted() -> Iterator[Patch]:
    """The device draws an id with the random number of the position after its own."""
    yield source("sample", "a.sequence->length + 1)", "a.sequence->length + 2)")


@fault(area="device", blames=("sampler",), models=ONE, engine="emu")
def device_draw_not_remembered() -> Iterator[Patch]:
    """An id that the device chose is not among those that the repetition penalty counts."""
    yield source("sample", "a.seen[id] = 1;", "")


@fault(area="device", blames=("sampler",), models=ONE, engine="emu")
def device_draw_tie_highest_id() -> Iterator[Patch]:
    """Of listed ids with equal logits the highest comes first."""
    yield source("sample", "w.list.ids[j] < id", "w.list.ids[j] > id")


@fault(area="device", blames=("sampler",), models=ONE, engine="emu")
def device_draw_bins_left_over() -> Iterator[Patch]:
    """A pass adds to the masses that the one before it left in the bins."""
    yield source("sample", "++i) a.bins[i] = 0;\n}", "++i) {}\n}")


@fault(area="device", blames=("sampler",), models=ONE, engine="emu")
def device_draw_filter_forgotten() -> Iterator[Patch]:
    """The draw sees every id again, whatever top-k and top-p left."""
    yield source("sample", "key > s.last_key ||", "")
    yield source("sample", "key == s.last_key && i > s.last_id", "s.phase != DRAW && key > s.last_key")
