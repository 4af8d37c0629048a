"""A Llama's weights and a decode slot come in; the launches of one token go out, five a layer."""

from __future__ import annotations

from typing import Any, Final

from prill_runtime.device.machine.base import Device, Pointer
from prill_runtime.device.memory.array import DeviceArray
from prill_runtime.device.memory.matrix import FORMATS, PLAIN, DeviceMatrix
from prill_runtime.device.memory.slot import TOKEN_OFFSET, Slot
from prill_runtime.device.ops.backend import CudaBackend, grid_of
from prill_runtime.models.base import EMBEDDING, Adapter
from prill_runtime.models.config import Config
from prill_runtime.models.llama import ROPE_FREQS, Llama

CLUSTER: Final = 8  # blocks of attention_decode that share a head of keys
TILE: Final = 16  # keys of one of its warps at a time
GROUP: Final = 8
MOST_DIM: Final = 256
ROWS: Final = 4
MODE: Final = {"plain": 0, "gate_up": 1, "qkv": 2}
LAUNCH: dict[str, tuple[int, int]] = {"fast": (512, 1), "exact": (256, 2), "values": (512, 1), "emu": (64, 1)}
"""Threads of a block, and blocks for each multiprocessor."""
AHEAD: Final = 2 << 20
"""Bytes of each of two matrices that attention asks for: with twice as much, the matrix before them waits."""
NOTHING: Final = (0,) * 8
MATRICES: Final = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def fits(adapter: Adapter) -> bool:
    """Whether the fused kernels cover the model: a Llama without biases, heads of whole 16-byte pieces."""
    c = adapter.config
    if not isinstance(adapter, Llama) or c.head_dim % 4 or c.head_dim > MOST_DIM:
        return False
    if c.n_heads // c.n_kv_heads > GROUP or c.width % 32 or c.ffn % 32:
        return False
    for w in adapter.blocks:
        kinds: Any = {name: w[f"{name}.weight"] for name in MATRICES}
        plain = all(isinstance(m, DeviceMatrix) for m in kinds.values())
        if (
            not plain
            or kinds["ffn_gate"].kind != kinds["ffn_up"].kind
            or any(f"{n}.bias" in w for n in MATRICES)
        ):
            return False
    return True


class FusedLlama:
    """Buffers of one token's way through the layers, and the launches that fill them."""

    def __init__(self, adapter: Adapter, ops: CudaBackend) -> None:
        c = adapter.config
        self.adapter, self.ops = adapter, ops
        self.x = ops.empty(1, c.width, purpose="scratch")
        self.q = ops.empty(1, c.n_heads * c.head_dim, purpose="scratch")
        self.mixed = ops.empty(1, c.n_heads * c.head_dim, purpose="scratch")
        self.act = ops.empty(1, c.ffn, purpose="scratch")
        dim, divisors = c.rope_dim or c.head_dim, adapter.weights.get(ROPE_FREQS)
        self.pairs = dim // 2
        self.frequencies = ops.frequencies(c.rope_base or 10000.0, dim, c.rope_factor or 1.0, divisors)
        self.angles = ops.empty(1, self.pairs, 2, purpose="scratch")

    def record(self, slot: Slot, logits: DeviceArray) -> None:
        """Queue one token: the id in the slot, at its position, to logits (1, vocab)."""
        adapter, ops, c = self.adapter, self.ops, self.adapter.config
        table: Any = adapter.weights[EMBEDDING]
        args = {"table": table.fields, "id": slot.pointer + TOKEN_OFFSET, "out": self.x.pointer,
                "position": slot.at("position"), "frequencies": self.frequencies.pointer,
                "angles": self.angles.pointer, "pairs": self.pairs}  # fmt: skip
        ops.device.launch(f"begin_{table.kind}", (grid_of(table.pitch, 64)[0] + 1,), 64, args)
        for layer, w in enumerate(adapter.blocks):
            weight: Any = {name: w[f"{name}.weight"] for name in MATRICES}
            q, k, v = (weight[name] for name in MATRICES[:3])
            common: Any = {"norm": w["attn_norm.weight"], "slot": slot, "layer": layer}
            if q.kind == k.kind == v.kind:
                self.stage("qkv", (q, k, v), self.x, self.q, **common)
            else:
                for part in range(3):
                    self.stage("qkv", (q, k, v), self.x, self.q, only=part, **common)
            pair = (weight["ffn_gate"], weight["ffn_up"])
            attend(ops.device, c, slot.pointer, layer, self.q.pointer, self.mixed.pointer, pair)
            self.stage("plain", (weight["attn_output"],), self.mixed, self.x, residual=self.x)
            self.stage("gate_up", pair, self.x, self.act, norm=w["ffn_norm.weight"])
            self.stage("plain", (weight["ffn_down"],), self.act, self.x, residual=self.x)
        head: Any = adapter.head_weight
        self.stage("plain", (head,), self.x, logits, norm=adapter.weights["output_norm.weight"])

    def stage(
        self,
        mode: str,
        matrices: tuple[DeviceMatrix, ...],
        x: DeviceArray,
        out: DeviceArray,
        *,
        norm: Any = None,
        residual: DeviceArray | None = None,
        slot: Slot | None = None,
        layer: int = 0,
        only: int | None = None,
    ) -> None:
        """Queue one launch of fused.cu.

        Args:
            only: of q, k and v, the one to compute; the others have launches of their own.
        """
        c, device = self.adapter.config, self.ops.device
        first = matrices[only or 0]
        fields = [m.fields for m in matrices] + [NOTHING] * (3 - len(matrices))
        rows = first.rows if mode == "gate_up" else sum(m.rows for m in matrices)
        if only is not None:
            fields = [_with_rows(first, first.rows if part == only else 0) for part in range(3)]
            rows = first.rows
        fast = self.ops.mode == "fast" and first.type not in PLAIN
        chunk = FORMATS[first.type].chunk
        shared = first.pitch * chunk + 8 * (first.cols // 32) if fast else 4 * first.pitch * chunk
        threads, each = LAUNCH[
            "emu"
            if device.target.emulated
            else "fast"
            if fast
            else "values"
            if first.type in PLAIN
            else "exact"
        ]
        groups = -(-rows // (ROWS // 2 if mode == "gate_up" else ROWS))
        grid = min(device.multiprocessors * each, groups)
        team, steps, rounds = team_of(groups, -(-first.pitch // 32), grid, threads // 32)
        args = {"m0": fields[0], "m1": fields[1], "m2": fields[2], "x": x.pointer,
                "norm": norm.pointer if norm is not None else 0,
                "residual": residual.pointer if residual is not None else 0, "out": out.pointer,
                "sequence": slot.pointer if slot is not None else 0, "angles": self.angles.pointer,
                "eps": c.norm_eps, "mode": MODE[mode], "layer": layer, "head_dim": c.head_dim,
                "kv_heads": c.n_kv_heads, "pairs": self.pairs,
                "team_bits": team.bit_length() - 1, "steps": steps, "rounds": rounds}  # fmt: skip
        kernel = f"fused_{'fast' if fast else 'exact'}_{first.kind}"
        device.launch(kernel, (max(1, grid),), threads, args, shared=shared)


def attend(
    device: Device,
    c: Config,
    sequence: Pointer,
    layer: int,
    q: Pointer,
    out: Pointer,
    ahead: tuple[DeviceMatrix, DeviceMatrix] | None = None,
) -> None:
    """Queue attention_decode: one row of q (head, dim) over a sequence's cache, itself included.

    Args:
        sequence: a SEQUENCE in device memory, whose length is the row's position. out: (head, dim).
        ahead: matrices of one shape that a later launch reads, to be asked into the second-level cache.
    """
    group, dim = c.n_heads // c.n_kv_heads, c.head_dim
    first, second = (matrix.pointers["q"] for matrix in ahead) if ahead else (0, 0)
    most = min(AHEAD, *(matrix.streams["q"] for matrix in ahead)) if ahead else 0
    args = {"sequence": sequence, "q": q, "out": out, "kv_heads": c.n_kv_heads, "group": group,
            "head_dim": dim, "layer": layer, "window": c.window or 0, "scale": dim**-0.5,
            "ahead0": first, "ahead1": second, "ahead_bytes": most}  # fmt: skip
    heads = next(size for size in (1, 2, 4, GROUP) if size >= group)
    wide = dim > MOST_DIM // 2
    tile = TILE // 2 if wide else TILE
    threads = 64 if device.target.emulated else 256
    floats = threads // 32 * (2 * tile * dim + (tile + 3) * heads)  # keys, values, weights, maxima and sums
    floats += heads * dim + CLUSTER * heads * (dim + 2)  # q, and what every block sends to the first
    kernel = f"attention_decode_{'wide_' if wide else ''}{heads}"
    device.launch(kernel, (CLUSTER, c.n_kv_heads), threads, args, shared=4 * floats)


def team_of(groups: int, steps: int, grid: int, warps: int) -> tuple[int, int, int]:
    """Warps that share a group of rows, a power of two: those with the fewest steps one after the other.

    Returns:
        The warps, steps of each for one group, groups one after the other.
    """
    sizes = [size for size in (1, 2, 4, 8, 16) if warps % size == 0]
    shares = [(size, -(-steps // size), -(-groups // (grid * (warps // size)))) for size in sizes]
    return min(shares, key=lambda share: share[1] * share[2])


def _with_rows(matrix: DeviceMatrix, rows: int) -> tuple[int, ...]:
    """Struct Matrix of a matrix as if it had so many rows."""
    at = matrix.fields
    return (*at[:4], rows, *at[5:])
