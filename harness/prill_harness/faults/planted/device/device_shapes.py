"""Faults of kernels that only some shapes show, and memory of the machine that is taken for zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prill_harness.faults.planted.device.device import _launch, source
from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE

ATTN = ("attn",)
PRODUCTS = ("q", "k", "v", "attn_out", "gate", "up", "down", "logits")
NORMS = ("attn_norm", "ffn_norm", "output_norm")
LAUNCH = "prill_runtime.device.machine.base:Device.launch"


@fault(area="shapes", blames=ATTN, models=ONE, engine="emu")
def device_fifth_split() -> Iterator[Patch]:
    """The combination of partial attention joins four splits at most."""
    yield source("attention", "min(position / SPLIT, a.splits - 1);", "min(position / SPLIT, first + 3);")


@fault(area="shapes", blames=("logits",), models=ONE, engine="emu")
def device_window_ignored() -> Iterator[Patch]:
    """The fused attention of a decoding step sees every key, whatever the window."""
    yield source(
        "attention_decode", "visible = a.window ? max(position - a.window + 1, 0) : 0;", "visible = 0;"
    )


@fault(area="shapes", blames=ATTN, models=ONE, engine="emu")
def device_head_tail() -> Iterator[Patch]:
    """Scores are summed in whole pieces of 32 components."""
    yield source("attention", "i = lane; i < dim; i += 8", "i = lane; i < dim / 32 * 32; i += 8")


@fault(area="shapes", blames=ATTN, models=ONE, engine="emu")
def device_wide_head() -> Iterator[Patch]:
    """One thread fetches one component of the query: those past the threads of a block are not there."""
    yield source(
        "attention",
        "for (int i = threadIdx.x; i < dim; i += THREADS) q[i]",
        "if (const int i = threadIdx.x; i < dim) q[i]",
    )


@fault(area="shapes", blames=ATTN, models=ONE, engine="emu")
def device_shared_too_small() -> Iterator[Patch]:
    """Attention is launched with shared memory for heads of 64, whatever their size."""

    def wrap(launch: Any) -> Any:
        def other(self: Any, name: str, grid: Any, block: Any, args: Any, shared: int = 0) -> None:
            launch(self, name, grid, block, args, min(shared, 256) if name == "attention_split" else shared)

        return other

    yield Patch(LAUNCH, wrap)


@fault(area="shapes", blames=PRODUCTS, models=ONE, engine="emu")
def device_columns_past_1024() -> Iterator[Patch]:
    """A mat-vec takes two chunks a thread at most."""
    yield source(
        "matvec", "c < a.m.pitch; c += blockDim.x", "c < a.m.pitch && c < 2 * blockDim.x; c += blockDim.x"
    )


@fault(area="shapes", blames=PRODUCTS, models=ONE, engine="emu")
def device_rows_past_4096() -> Iterator[Patch]:
    """The grid of a tiled product has 64 tiles of rows at most."""

    def change(grid: list[int], args: dict[str, Any]) -> None:
        grid[1] = min(grid[1], 64)

    yield _launch("matmul", change)


@fault(area="shapes", blames=PRODUCTS, models=ONE, engine="emu")
def device_odd_rows() -> Iterator[Patch]:
    """A tiled product of more than 300 rows leaves out the last of an odd number."""

    def change(grid: list[int], args: dict[str, Any]) -> None:
        if args["rows"] > 300:
            args["rows"] -= args["rows"] % 2

    yield _launch("matmul", change)


@fault(area="shapes", blames=("q_rope", "k_rope"), needs=("rope",), engine="emu")
def device_grid_rounded_down() -> Iterator[Patch]:
    """Rotation is launched with whole blocks of threads alone."""

    def change(grid: list[int], args: dict[str, Any]) -> None:
        if "head_dim" in args:
            threads = args["rows"] * args["heads"] * (args["head_dim"] - args["pairs"])
            grid[0] = max(1, threads // 128)

    yield _launch("rope", change)


@fault(area="shapes", blames=NORMS, needs=("rms_norm",), engine="emu")
def device_norm_past_1024() -> Iterator[Patch]:
    """RMSNorm sums the squares of 1,024 values at most."""
    yield source(
        "norm",
        "i < a.width; i += blockDim.x) squares += x[i] * x[i];",
        "i < min(a.width, 1024); i += blockDim.x) squares += x[i] * x[i];",
    )


@fault(area="shapes", blames=PRODUCTS, models=ONE, engine="emu")
def device_shared_taken_for_zero() -> Iterator[Patch]:
    """A tiled product leaves shared memory past the last column as it finds it."""
    yield source(
        "matmul",
        "left[i % DEPTH][i / DEPTH] = row < a.rows && k < a.m.cols ?",
        "if (row < a.rows && k < a.m.cols) left[i % DEPTH][i / DEPTH] = true ?",
    )


@fault(area="shapes", blames=PRODUCTS, models=ONE, engine="emu")
def device_registers_taken_for_zero() -> Iterator[Patch]:
    """A mat-vec adds up in registers that nobody set."""
    yield source("matvec", "float total[ROWS] = {};", "float total[ROWS];")


@fault(area="shapes", blames=ATTN, models=ONE, engine="emu")
def device_memory_taken_for_zero() -> Iterator[Patch]:
    """Partial attention adds its mixture to memory fresh from the arena."""
    yield source("attention", "out[2 + i] = mixed;", "out[2 + i] += mixed;")


@fault(area="shapes", blames=("attn",), models=ONE, engine="emu")
def device_static_not_reset() -> Iterator[Patch]:
    """A softmax goes on from the sum that the call before it left in a static."""
    yield source(
        "softmax",
        "float top = minus_infinity(), sum = 0.0f;",
        "static float carried[256]; float top = minus_infinity(), &sum = carried[threadIdx.x];",
    )
