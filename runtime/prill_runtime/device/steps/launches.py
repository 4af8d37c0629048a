"""Launches of the fused kernels for one row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from prill_runtime.device.machine.base import Device, Pointer
from prill_runtime.device.memory.array import BLOCK_THREADS, DeviceArray
from prill_runtime.device.memory.matrix import FORMATS, PLAIN, DeviceMatrix, Matrix
from prill_runtime.device.ops.backend import CudaBackend
from prill_runtime.models.nodes.attention import Attention
from prill_runtime.models.nodes.experts import Experts

CLUSTER_BLOCKS: Final = 8  # blocks of attention_decode that share a head of keys
TILE_KEYS: Final = 16  # keys that a warp of attention_decode takes at a time
MOST_QUERY_HEADS: Final = 8
MOST_HEAD_DIM: Final = 256
ROUTER_THREADS: Final = 256
MOST_EXPERTS: Final = 256
MOST_USED: Final = 16  # experts of a row
TEAM_ROWS: Final = 4
PRODUCT_MODES: Final = {"plain": 0, "gate_up": 1, "qkv": 2}
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
    neox: int = 0
    gelu: int = 0


class HeadNorms(NamedTuple):
    """Norms of heads of queries and of the new key, and their rotation, where attention_decode does these."""

    q_norm: Pointer = 0
    k_norm: Pointer = 0
    angles: Pointer = 0
    eps: float = 0.0
    pairs: int = 0
    neox: int = 0


NO_HOOKS: Final = Hooks()
NO_HEAD_NORMS: Final = HeadNorms()
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
    groups = -(-rows // (TEAM_ROWS // 2 if mode == "gate_up" else TEAM_ROWS))
    shape = Streamed.of(ops, first, groups, placing=int(mode == "qkv" and hooks is not None))
    args = {"m0": fields[0], "m1": fields[1], "m2": fields[2], "x": x.pointer, "norm": norm,
            "residual": residual.pointer if residual is not None else 0, "out": out.pointer, "eps": eps,
            "mode": PRODUCT_MODES[mode], **shape.shares,
            **heads._asdict(), **(hooks or NO_HOOKS)._asdict()}  # fmt: skip
    shape.launch(device, "fused" if hooks is None else "hooked", args)


class Streamed(NamedTuple):
    """How a launch is divided whose blocks stream groups of rows past activations in shared memory.

    Attributes:
        suffix: of the kernel's name. threads: of a block. shared: bytes of it. shares: arguments.
    """

    suffix: str
    grid: int
    threads: int
    shared: int
    shares: Mapping[str, int]

    @classmethod
    def of(
        cls, ops: CudaBackend, matrix: DeviceMatrix, groups: int, times: int = 1, placing: int = 0
    ) -> Streamed:
        """`groups` of rows of such a matrix, each `times` as wide as it is; `placing` as in `team_of`."""
        device, pitch = ops.device, times * matrix.pitch
        plain, chunk = matrix.type in PLAIN, FORMATS[matrix.type].chunk
        fast = ops.mode == "fast" and not plain
        shared = pitch * chunk + 8 * (times * matrix.cols // 32) if fast else 4 * pitch * chunk
        how = "fast" if fast else "values" if plain else "exact"
        threads, each = BLOCK_SHAPES["emu" if device.target.emulated else how]
        grid = max(1, min(device.multiprocessors * each, groups))
        team, steps, rounds = team_of(groups, -(-pitch // 32), grid, threads // 32, placing)
        shares = {"team_bits": team.bit_length() - 1, "steps": steps, "rounds": rounds}
        return cls(f"{'fast' if fast else 'exact'}_{matrix.kind}", grid, threads, shared, shares)

    def launch(self, device: Device, kernel: str, args: Mapping[str, Any]) -> None:
        """Queue it."""
        device.launch(f"{kernel}_{self.suffix}", (self.grid,), self.threads, args, shared=self.shared)


def add_normed(device: Device, branch: DeviceArray, norm: Pointer, eps: float, x: DeviceArray) -> None:
    """Queue an RMSNorm of what a branch made (1, width), added to the stream x in place."""
    args = {"x": branch.pointer, "weight": norm, "bias": 0, "residual": x.pointer, "out": x.pointer,
            "width": x.width, "eps": eps}  # fmt: skip
    device.launch("rms_norm", (1,), BLOCK_THREADS, args)


def route(
    ops: CudaBackend,
    matrix: DeviceMatrix,
    x: DeviceArray,
    logits: DeviceArray,
    norm: Pointer,
    eps: float,
    bias: Pointer,
) -> None:
    """Queue a router's logits (1, expert) of a row, from the norm before it; always in float32."""
    args = {"m": matrix.fields, "x": x.pointer, "norm": norm, "bias": bias, "out": logits.pointer,
            "eps": eps}  # fmt: skip
    ops.device.launch(f"router_{matrix.kind}", (matrix.rows,), ROUTER_THREADS, args)


def mixture(
    ops: CudaBackend,
    node: Experts,
    matrices: tuple[DeviceMatrix, ...],
    biases: tuple[Pointer, ...],
    logits: DeviceArray,
    x: DeviceArray,
    out: DeviceArray,
    *,
    norm: Pointer = 0,
    eps: float = 0.0,
    residual: DeviceArray | None = None,
    ahead: DeviceMatrix | None = None,
) -> None:
    """Queue gate, up and activation of the experts that logits choose, (used, out).

    Of one matrix: down of these experts, and their sum (out,).

    Args:
        ahead: a matrix that the next launch reads, to be prefetched into the L2 cache: after gate and up that
            of all experts, of which the chosen ones are.
    """
    first, down = matrices[0], len(matrices) == 1
    outs = first.rows // node.router.rows
    groups = -(-outs // TEAM_ROWS) if down else node.used * -(-outs // (TEAM_ROWS // 2))
    shape = Streamed.of(ops, first, groups, node.used if down else 1)
    limit, alpha = node.clamp or (0.0, 1.0)
    parts = node.used if down else node.router.rows
    args = {"m0": first.fields, "m1": NO_MATRIX if down else matrices[1].fields, "x": x.pointer,
            "norm": norm, "logits": logits.pointer, "bias0": biases[0], "bias1": biases[-1],
            "residual": residual.pointer if residual is not None else 0, "out": out.pointer, "eps": eps,
            "next": 0 if ahead is None else ahead.pointers["q"],
            "next_bytes": 0 if ahead is None else ahead.streams["q"] // parts // 16 * 16,
            "down": int(down), "outs": outs, "experts": node.router.rows, "used": node.used,
            "normalised": int(node.normalised), "limit": limit, "alpha": alpha, **shape.shares}  # fmt: skip
    shape.launch(ops.device, "mixture", args)


def attend(
    device: Device,
    a: Attention,
    sequence: Pointer,
    q: Pointer,
    out: Pointer,
    ahead: tuple[DeviceMatrix, ...] = (),
    most: int = PREFETCH_BYTES,
    sinks: Pointer = 0,
    norms: HeadNorms = NO_HEAD_NORMS,
) -> None:
    """Queue attention_decode: one row of q (head, dim) over a sequence's cache, its own key included.

    Args:
        sequence: a SEQUENCE_DTYPE in device memory, whose length is the row's position. out: (head, dim).
        ahead: one or two matrices of one shape that a later launch reads, to be prefetched into the L2 cache.
        most: bytes of each to prefetch, of one matrix of each half.
        sinks: (head,), scores of no key; 0 if there are none.
        norms: of heads; then q and the row's key in the cache are as projected, and the key is put back.
    """
    group, dim = a.heads // a.kv_heads, a.size
    first, second, most = _asked(ahead, most)
    beta, original = a.temper or (0.0, 1)
    args = {"sequence": sequence, "q": q, "out": out, "kv_heads": a.kv_heads, "group": group,
            "head_dim": dim, "layer": a.layer, "window": a.window or 0, "scale": a.scale, "sinks": sinks,
            "ahead0": first, "ahead1": second, "ahead_bytes": most, "softcap": a.softcap or 0.0,
            "beta": beta, "original": original, **norms._asdict()}  # fmt: skip
    heads = next(size for size in (1, 2, 4, MOST_QUERY_HEADS) if size >= group)
    wide = dim > MOST_HEAD_DIM // 2
    tile = TILE_KEYS // 2 if wide else TILE_KEYS
    threads = 64 if device.target.emulated else 256
    floats = threads // 32 * (2 * tile * dim + (tile + 3) * heads)  # keys, values, weights, maxima and sums
    floats += heads * dim + CLUSTER_BLOCKS * heads * (dim + 2)  # q, and what every block sends to the first
    kernel = f"attention_decode_{'wide_' if wide else ''}{heads}"
    device.launch(kernel, (CLUSTER_BLOCKS, a.kv_heads), threads, args, shared=4 * floats)


def _asked(ahead: tuple[DeviceMatrix, ...], most: int) -> tuple[Pointer, Pointer, int]:
    """Two addresses, and how many bytes to prefetch from each: the two halves if there is one matrix."""
    if not ahead:
        return 0, 0, 0
    size = ahead[0].streams["q"]
    places = [matrix.pointers["q"] for matrix in ahead]
    if len(ahead) == 1:
        size = size // 32 * 16
        places.append(places[0] + size)
    return places[0], places[1], min(most, size)


def team_of(groups: int, steps: int, grid: int, warps: int, placing: int = 0) -> tuple[int, int, int]:
    """How many warps share a group of rows: the power of two with the fewest steps in sequence.

    Args:
        placing: the steps that finding a group's rows and adding up a team's sums takes as long as.

    Returns:
        The warps, steps of each per group, groups in sequence.
    """
    sizes = [size for size in (1, 2, 4, 8, 16) if warps % size == 0]
    shares = [(size, -(-steps // size), -(-groups // (grid * (warps // size)))) for size in sizes]
    return min(shares, key=lambda share: (share[1] + placing) * share[2])
