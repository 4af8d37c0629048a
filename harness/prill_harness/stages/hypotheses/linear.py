"""Ways to get a projection wrong: the wiring, the bias, the bytes of its weight."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from prill_harness.stages.hypotheses.case import Array, Case, Guess, hypothesis
from prill_harness.stages.hypotheses.storage import misreadings

LINEAR = ("q", "k", "v", "attn_out", "gate", "up", "down", "logits")
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


@hypothesis(*LINEAR)
def wiring(case: Case) -> Iterator[Guess]:
    """The bias, the orientation, the rows, another tensor."""
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
        yield f"bias of {stem} subtracted", right - bias
    yield f"{stem} never loaded (zeros)", np.zeros_like(right) + add
    if weight.shape[0] == weight.shape[1]:
        yield f"{stem} transposed", x @ weight + add
    swapped = weight.reshape(-1).reshape(weight.shape[::-1]).T
    yield f"{stem} read with its dimensions swapped", x @ swapped.T + add
    for by in (1, -1):
        yield f"rows of {stem} shifted by one", x @ np.roll(weight, by, axis=0).T + add
        yield f"columns of {stem} shifted by one", x @ np.roll(weight, by, axis=1).T + add
    last = weight.copy()
    last[:, -1] = 0
    yield f"last column of {stem} left out of the sum", x @ last.T + add
    if weight.shape[1] % 32 == 0 and weight.shape[1] > 32:
        last[:, -32:] = 0
        yield f"last block of 32 columns of {stem} left out of the sum", x @ last.T + add
    if weight.shape[0] % 2 == 0:
        halves = np.concatenate(np.split(weight, 2)[::-1])
        yield f"halves of {stem} exchanged", x @ halves.T + add
    for name, other in _others(case, stem):
        if other.shape == weight.shape:
            yield f"{name} used instead of {stem}", x @ other.T + add


@hypothesis("logits")
def capped(case: Case) -> Iterator[Guess]:
    """Logits capped as another architecture's are."""
    for cap in (30.0, 50.0):
        yield f"softly capped at {cap:g} (cap tanh(x / cap))", cap * np.tanh(case.want / cap)


@hypothesis("q", "k")
def head_layout(case: Case) -> Iterator[Guess]:
    """Rows of a head in rotary order of the other convention."""
    want = case.want.reshape(len(case.want), -1, int(case.number("head_dim", case.want.shape[-1])))
    half, odd = divmod(want.shape[-1], 2)
    if odd:  # no pairs to exchange
        return
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
            yield name, _part(case, array) if "attn_qkv" in name else array
    if "attn_qkv" in stem and (fused := case.weight(f"{stem}.weight")) is not None:
        for kind, part in zip("qkv", np.split(fused, 3), strict=True):
            if kind != case.stage.kind:
                yield f"the {kind} rows of {stem}", part


@hypothesis(*LINEAR)
def bytes_of_the_weight(case: Case) -> Iterator[Guess]:
    """The weight's bytes, or its bias's, decoded the wrong way."""
    found = _tensors(case)
    if found is None:
        return
    stem, weight, bias = found
    add = 0.0 if bias is None else bias
    whole = case.weight(f"{stem}.weight")
    assert whole is not None
    for clause, decoded in misreadings(case, f"{stem}.weight", whole.shape):
        yield f"{stem}: {clause}", case.inputs[0] @ _part(case, decoded).T + add
    fused = case.weight(f"{stem}.bias")
    if fused is not None:
        for clause, decoded in misreadings(case, f"{stem}.bias", fused.shape):
            yield f"bias of {stem}: {clause}", case.inputs[0] @ weight.T + _part(case, decoded)
