"""Ways to get a projection wrong: the wiring, the bias, the bytes of its weight."""

from __future__ import annotations

import re
from collections.abc import Iterator

import gguf
import numpy as np
from numpy.typing import NDArray

from cupel_harness.hypotheses.case import Array, Case, Guess, hypothesis

_FUSED = {"q": 0, "k": 1, "v": 2}


def _part(case: Case, array: Array) -> Array:
    """The rows of a fused QKV tensor that belong to this stage; other tensors whole."""
    if "attn_qkv" not in case.stage.tensors[0]:
        return array
    return np.split(array, 3)[_FUSED[case.stage.kind]]


def _tensors(case: Case) -> tuple[str, Array, Array | None] | None:
    for stem in case.stage.tensors:
        weight = case.weight(f"{stem}.weight")
        if weight is not None:
            bias = case.weight(f"{stem}.bias")
            return stem, _part(case, weight), None if bias is None else _part(case, bias)
    return None


@hypothesis("q", "k", "v", "attn_out", "gate", "up", "down", "logits")
def wiring(case: Case) -> Iterator[Guess]:
    found = _tensors(case)
    if found is None:
        return
    stem, weight, bias = found
    x = case.inputs[0]
    add = 0.0 if bias is None else bias
    right = x @ weight.T
    if bias is not None:
        yield f"bias of {stem} left out", right
        yield f"bias of {stem} added twice", right + 2 * bias
    yield f"{stem} never loaded (zeros)", np.zeros_like(right) + add
    if weight.shape[0] == weight.shape[1]:
        yield f"{stem} transposed", x @ weight + add
    swapped = weight.reshape(-1).reshape(weight.shape[::-1]).T
    yield f"{stem} read with its dimensions swapped", x @ swapped.T + add
    for by in (1, -1):
        yield f"rows of {stem} shifted by one", x @ np.roll(weight, by, axis=0).T + add
    if weight.shape[0] % 2 == 0:
        halves = np.concatenate(np.split(weight, 2)[::-1])
        yield f"halves of {stem} exchanged", x @ halves.T + add
    for name, other in _others(case, stem):
        if other.shape == weight.shape:
            yield f"{name} used instead of {stem}", x @ other.T + add


@hypothesis("q", "k")
def head_layout(case: Case) -> Iterator[Guess]:
    """Rows of a head in rotary order of the other convention."""
    want = case.want.reshape(len(case.want), -1, int(case.number("head_dim", case.want.shape[-1])))
    half = want.shape[-1] // 2
    split = want.reshape(*want.shape[:-1], half, 2).swapaxes(-1, -2)
    yield "rows of each head in half-split order instead of pairs", split
    joined = want.reshape(*want.shape[:-1], 2, half).swapaxes(-1, -2)
    yield "rows of each head in pair order instead of half-split", joined


def _others(case: Case, stem: str) -> Iterator[tuple[str, Array]]:
    """Tensors a slip of the wiring would read: the neighbours in the block, the same one a block away."""
    if stem in ("output", "token_embd"):
        other = "token_embd" if stem == "output" else "output"
        names = [other]
    else:
        layer = case.stage.layer or 0
        leaf = stem.rpartition(".")[2]
        leaves = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        names = [f"blk.{layer}.{other}" for other in leaves if other != leaf]
        names += [f"blk.{layer + step}.{leaf}" for step in (-1, 1) if layer + step >= 0]
    for name in names:
        array = case.weight(f"{name}.weight")
        if array is not None:
            yield name, _part(case, array)
    if "attn_qkv" in stem and (fused := case.weight(f"{stem}.weight")) is not None:
        for kind, part in zip("qkv", np.split(fused, 3), strict=True):
            if kind != case.stage.kind:
                yield f"the {kind} rows of {stem}", part


@hypothesis("q", "k", "v", "attn_out", "gate", "up", "down", "logits")
def blocks(case: Case) -> Iterator[Guess]:
    """The weight's blocks decoded the wrong way."""
    found = _tensors(case)
    if found is None or (raw := case.raw(f"{found[0]}.weight")) is None:
        return
    stem, _, bias = found
    add = 0.0 if bias is None else bias
    whole = case.weight(f"{stem}.weight")
    if whole is None:
        return
    for clause, decoded in _misreadings(*raw):
        yield f"{stem}: {clause}", case.inputs[0] @ _part(case, decoded.reshape(whole.shape)).T + add


def _misreadings(data: NDArray[np.uint8], kind: str) -> Iterator[tuple[str, Array]]:
    quant = gguf.GGMLQuantizationType[kind]
    _, size = gguf.GGML_QUANT_SIZES[quant]

    def decode(block: NDArray[np.uint8]) -> Array:
        return np.asarray(gguf.quants.dequantize(block, quant), dtype=np.float64)

    block = np.ascontiguousarray(data).reshape(-1, size)
    if re.fullmatch(r"Q4_[01]", kind):
        values = decode(block).reshape(-1, 2, 16).swapaxes(1, 2)
        yield "nibbles interleaved instead of low half then high half", values
    if kind == "Q8_0":
        scale = block[:, :2].copy().view(np.float16).astype(np.float64)
        bits = block[:, :2].copy().view(np.uint16).astype(np.uint32) << 16
        wrong = bits.view(np.float32).astype(np.float64)
        quants = block[:, 2:].view(np.int8).astype(np.float64)
        yield "block scale read as bfloat16", quants * wrong
        yield "block scale left out", quants * np.where(scale == 0, 0, 1)
    if kind == "Q4_K":
        zeroed = block.copy()
        zeroed[:, 16:] = 0
        yield "minimum added instead of subtracted", decode(block) - 2 * decode(zeroed)
        yield "minimum left out", decode(block) - decode(zeroed)
    if kind == "Q6_K":
        swapped = block.copy()
        high = block[:, 128:192]
        swapped[:, 128:192] = ((high & 0x33) << 2) | ((high & 0xCC) >> 2)
        yield "high bits of the two halves exchanged", decode(swapped)
    if kind == "F16":
        bits = block.reshape(-1).view(np.uint16).astype(np.uint32) << 16
        yield "float16 read as bfloat16", bits.view(np.float32).astype(np.float64)
    if kind == "BF16":
        yield "bfloat16 read as float16", block.reshape(-1).view(np.float16).astype(np.float64)
