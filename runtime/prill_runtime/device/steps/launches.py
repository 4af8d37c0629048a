"""Launches of the fused kernels for one row."""

from __future__ import annotations

from typing import Final, NamedTuple

from prill_runtime.device.machine.base import Device, Pointer
from prill_runtime.device.memory.array import DeviceArray
from prill_runtime.device.memory.matrix import FORMATS, PLAIN, DeviceMatrix, Matrix
from prill_runtime.device.ops.backend import CudaBackend
from prill_runtime.models.nodes.attention import Attention

CLUSTER_BLOCKS: Final = 8  # blocks of attention_decode that share a head of keys
TILE_KEYS: Final = 16  # keys that a warp of attention_decode takes at a time
MOST_QUERY_HEADS: Final = 8
MOST_HEAD_DIM: Final = 256
TEAM_ROWS: Final = 4
PRODUCT_MODES: Final = {"plain": 0, "gate_up": 1, "qkv": 2, "gelu": 3}
BLOCK_SHAPES: dict[str, tuple[int, int]] = {
    "fast": (512, 1),
    "exact": (256, 2),
    "values": (512, 1),
    "emu": (64, 1),
}
"""Threads of a block, and blocks per multiprocessor."""
PREFETCH_BYTES: Final = 2 << 20
"""Bytes of each of two matrices that attention prefetches; twice as many delay the matrix before them."""
NO_MATRIX: Final = Matrix(0, 0, 0, 0, 0, 0, 0, 0)


class Heads(NamedTuple):
    """What rotating queries and storing keys and values needs: the cache, the angles, and sizes."""

    sequence: Pointer
    angles: Pointer
    layer: int
    head_dim: int
    kv_heads: int
    pairs: int


class Hooks(NamedTuple):
    """The optional parts of kernels with hooks (fused.cuh); a pointer is 0 if there is no such part."""

    norm_bias: Pointer = 0
    bias0: Pointer = 0
    bias1: Pointer = 0
    bias2: Pointer = 0
    q_rows: int = 0
    kv_rows: int = 0


NO_HOOKS: Final = Hooks()
NO_HEADS: Final = Heads(0, 0, 0, 0, 0, 0)


def product(
    ops: CudaBackend,
    mode: str,
    matrices: tuple[DeviceMatrix, ...],
    x: DeviceArray,
    out: DeviceArray,
    *,
    norm: Pointer = 0,
    eps: float = 0.0,
    residual: DeviceArray | None = None,
    heads: Heads = NO_HEADS,
    hooks: Hooks | None = None,
    only: int | None = None,
) -> None:
    """Queue one launch of fused.cu, or of hooked.cu where there are hooks.

    Args:
        only: which of q, k and v to compute; the others have launches of their own.
    """
    device, first = ops.device, matrices[only or 0]
    fields = [m.fields for m in matrices] + [NO_MATRIX] * (3 - len(matrices))
    rows = first.rows if mode == "gate_up" else sum(m.rows for m in matrices)
    if only is not None:
        fields = [first.fields._replace(rows=first.rows if part == only else 0) for part in range(3)]
        rows = first.rows
    if hooks is not None and len(matrices) == 3:
        hooks = hooks._replace(q_rows=fields[0].rows, kv_rows=fields[1].rows)
    fast = ops.mode == "fast" and first.type not in PLAIN
    chunk = FORMATS[first.type].chunk
    shared = first.pitch * chunk + 8 * (first.cols // 32) if fast else 4 * first.pitch * chunk
    how = "fast" if fast else "values" if first.type in PLAIN else "exact"
    threads, each = BLOCK_SHAPES["emu" if device.target.emulated else how]
    groups = -(-rows // (TEAM_ROWS // 2 if mode == "gate_up" else TEAM_ROWS))
    grid = min(device.multiprocessors * each, groups)
    team, steps, rounds = team_of(groups, -(-first.pitch // 32), grid, threads // 32)
    args = {"m0": fields[0], "m1": fields[1], "m2": fields[2], "x": x.pointer, "norm": norm,
            "residual": residual.pointer if residual is not None else 0, "out": out.pointer, "eps": eps,
            "mode": PRODUCT_MODES[mode], "team_bits": team.bit_length() - 1, "steps": steps, "rounds": rounds,
            **heads._asdict(), **(hooks or NO_HOOKS)._asdict()}  # fmt: skip
    file = "fused" if hooks is None else "hooked"
    kernel = f"{file}_{'fast' if fast else 'exact'}_{first.kind}"
    device.launch(kernel, (max(1, grid),), threads, args, shared=shared)


def attend(
    device: Device,
    a: Attention,
    sequence: Pointer,
    q: Pointer,
    out: Pointer,
    ahead: tuple[DeviceMatrix, ...] = (),
) -> None:
    """Queue attention_decode: one row of q (head, dim) over a sequence's cache, its own key included.

    Args:
        sequence: a SEQUENCE_DTYPE in device memory, whose length is the row's position. out: (head, dim).
        ahead: one or two matrices of one shape that a later launch reads, to be prefetched into the L2 cache.
    """
    group, dim = a.heads // a.kv_heads, a.size
    first, second, most = _asked(ahead)
    args = {"sequence": sequence, "q": q, "out": out, "kv_heads": a.kv_heads, "group": group,
            "head_dim": dim, "layer": a.layer, "window": a.window or 0, "scale": a.scale,
            "ahead0": first, "ahead1": second, "ahead_bytes": most}  # fmt: skip
    heads = next(size for size in (1, 2, 4, MOST_QUERY_HEADS) if size >= group)
    wide = dim > MOST_HEAD_DIM // 2
    tile = TILE_KEYS // 2 if wide else TILE_KEYS
    threads = 64 if device.target.emulated else 256
    floats = threads // 32 * (2 * tile * dim + (tile + 3) * heads)  # keys, values, weights, maxima and sums
    floats += heads * dim + CLUSTER_BLOCKS * heads * (dim + 2)  # q, and what every block sends to the first
    kernel = f"attention_decode_{'wide_' if wide else ''}{heads}"
    device.launch(kernel, (CLUSTER_BLOCKS, a.kv_heads), threads, args, shared=4 * floats)


def _asked(ahead: tuple[DeviceMatrix, ...]) -> tuple[Pointer, Pointer, int]:
    """Two addresses, and how many bytes to prefetch from each: the two halves if there is one matrix."""
    if not ahead:
        return 0, 0, 0
    size = ahead[0].streams["q"]
    places = [matrix.pointers["q"] for matrix in ahead]
    if len(ahead) == 1:
        size = size // 32 * 16
        places.append(places[0] + size)
    return places[0], places[1], min(PREFETCH_BYTES, size)


def team_of(groups: int, steps: int, grid: int, warps: int) -> tuple[int, int, int]:
    """How many warps share a group of rows: the power of two with the fewest steps in sequence.

    Returns:
        The warps, steps of each per group, groups in sequence.
    """
    sizes = [size for size in (1, 2, 4, 8, 16) if warps % size == 0]
    shares = [(size, -(-steps // size), -(-groups // (grid * (warps // size)))) for size in sizes]
    return min(shares, key=lambda share: share[1] * share[2])
