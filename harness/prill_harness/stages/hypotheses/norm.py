"""Ways to get RMSNorm and LayerNorm wrong."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from prill_harness.stages.hypotheses.case import Array, Case, Guess, hypothesis
from prill_harness.stages.hypotheses.storage import misreadings
from prill_runtime.models.nodes.network import Layer
from prill_runtime.models.nodes.norms import LayerNorm, Norm

EPSILONS = (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 1e-2)


@hypothesis(Norm)
def norms(case: Case, node: Norm) -> Iterator[Guess]:
    """The epsilon, the statistics, the weight, the bias."""
    x = case.inputs[0]
    stem = node.stem
    weight, bias = case.weight(f"{stem}.weight"), case.weight(f"{stem}.bias")
    if weight is None:
        return
    shift = np.zeros_like(weight) if bias is None else bias
    layer_norm, eps = isinstance(node, LayerNorm), node.eps
    name = "LayerNorm" if layer_norm else "RMSNorm"
    n = x.shape[-1]

    def normed(eps: float = eps, centre: bool = layer_norm, count: int = n) -> Array:
        y = x - x.mean(axis=-1, keepdims=True) if centre else x
        return np.asarray(y / np.sqrt((y**2).sum(axis=-1, keepdims=True) / count + eps))

    plain = normed()
    yield f"epsilon {eps:g} as the file states, where the oracle's differs", plain * weight + shift
    for other in EPSILONS:
        if abs(other - eps) > 1e-6 * eps:
            yield f"epsilon {other:g} instead of {eps:g}", normed(other) * weight + shift
    y = x - x.mean(axis=-1, keepdims=True) if layer_norm else x
    root = np.sqrt((y**2).mean(axis=-1, keepdims=True))
    yield "epsilon added outside the square root", y / (root + eps) * weight + shift
    yield "sum of squares not divided by n", normed(count=1) * weight + shift
    half = x[..., : n // 2]
    over = np.sqrt((half**2).mean(axis=-1, keepdims=True) + eps)
    if not layer_norm:
        yield "mean square over the first half only", x / over * weight
    yield "variance over n-1 instead of n", normed(count=n - 1) * weight + shift
    yield f"{name} weight left out", plain + shift
    yield f"{name} weight offset by one (w + 1)", plain * (weight + 1) + shift
    yield f"{name} weight shifted by one element", plain * np.roll(weight, 1) + shift
    yield f"{name} weight shifted by one element", plain * np.roll(weight, -1) + shift
    if bias is not None:
        yield f"{name} bias left out", plain * weight
        yield f"{name} bias subtracted", plain * weight - shift
    yield "not normalised", x * weight + shift
    if layer_norm:
        yield "mean not subtracted (RMSNorm instead of LayerNorm)", normed(centre=False) * weight + shift
    else:
        yield "mean subtracted (LayerNorm instead of RMSNorm)", normed(centre=True) * weight
    if x.ndim == 3:
        together = np.sqrt((x**2).mean(axis=(1, 2), keepdims=True) + eps)
        yield "normalised over all heads together instead of each by itself", x / together * weight + shift
    for name_of, source in _sources(case, node):
        z = source - source.mean(axis=-1, keepdims=True) if layer_norm else source
        root = np.sqrt((z**2).mean(axis=-1, keepdims=True) + eps)
        yield f"computed from {name_of}", z / root * weight + shift
    for other_stem in _neighbours(case, node):
        other_weight = case.weight(f"{other_stem}.weight")
        if other_weight is not None:
            other_bias = case.weight(f"{other_stem}.bias")
            moved = shift if other_bias is None else other_bias
            yield f"weights of {other_stem} used", plain * other_weight + moved
    yield f"{name} weight rounded to float16", plain * weight.astype(np.float16) + shift
    for clause, wrong in misreadings(case, f"{stem}.weight", weight.shape):
        yield f"{name} weight of {stem}: {clause}", plain * wrong + shift
    if bias is not None:
        for clause, wrong in misreadings(case, f"{stem}.bias", bias.shape):
            yield f"{name} bias of {stem}: {clause}", plain * weight + wrong


def _sources(case: Case, node: Norm) -> Iterator[tuple[str, Array]]:
    """What the norm of a feed-forward layer reads in a block that is put together the other way."""
    layer = next((each for each in case.nodes(Layer) if each.dense.norm == node), None)
    if layer is None:
        return
    if layer.parallel and (attended := case.values.get(layer.attention.last)) is not None:
        yield (
            "the stream behind attention: branches one after the other, where they are side by side",
            (case.inputs[0] + attended),
        )
    before = None if layer.parallel else case.values.get(case.table[f"{layer.at}ffn_in"].inputs[0])
    if before is not None:
        yield "the stream before attention: branches side by side, where one follows the other", before


def _neighbours(case: Case, node: Norm) -> Iterator[str]:
    """Stems of other norms of the same width: those of its own block and of the next, and the last."""
    own = case.stage.layer
    for stage in case.table.values():
        other = stage.node
        near = own is None or stage.layer is None or abs(stage.layer - own) <= 1
        if isinstance(other, Norm) and near and other.width == node.width and other.stem != node.stem:
            yield other.stem
