"""Ways to get a mixture of experts wrong: its router, its matrices, its activation, its sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from prill_harness.stages.hypotheses.case import Array, Case, Guess, hypothesis, wrong_rows
from prill_harness.stages.hypotheses.feedforward import ACTIVATIONS
from prill_harness.stages.hypotheses.storage import misreadings
from prill_runtime.models.nodes.experts import ExpertLinear, Experts

Chosen = NDArray[np.intp]


def _softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _at(chosen: Chosen, weights: Array, experts: int) -> Array:
    """(token, expert) of weights (token, place) of the chosen (token, place)."""
    routed = np.zeros((len(chosen), experts))
    np.put_along_axis(routed, chosen, weights, axis=-1)
    return routed


def _places(routed: Array, used: int) -> tuple[Chosen, NDArray[np.bool_]]:
    """(token, used): ids of a token's experts, ascending, and which of the places are taken; where there are
    fewer experts, the first of all has the rest."""
    ids = np.argsort(routed == 0, axis=-1, kind="stable")[:, :used]
    taken = np.take_along_axis(routed, ids, axis=-1) != 0
    return np.where(taken, ids, 0), taken


@hypothesis(Experts, stages=("routed",))
def router(case: Case, node: Experts) -> Iterator[Guess]:
    """Which experts, and with what weights."""
    (logits,), used, n = case.inputs, node.used, case.inputs[0].shape[1]
    order = np.argsort(-logits, axis=-1, kind="stable")
    best = order[:, :used]
    own, over_all = (
        np.take_along_axis(logits, best, axis=-1),
        np.take_along_axis(_softmax(logits), best, axis=-1),
    )

    def chosen(ids: Chosen) -> Array:
        """Weights of other experts, by the node's own rule."""
        of = np.take_along_axis(logits if node.normalised else _softmax(logits), ids, axis=-1)
        return _at(ids, _softmax(of) if node.normalised else of, n)

    yield f"the {used} largest as the file states, where the oracle's differ", chosen(best)
    if node.normalised:
        clause = "softmax before the choice: over all experts instead of the chosen, not brought to 1"
        yield clause, _at(best, over_all, n)
    else:
        clause = "softmax behind the choice: over the chosen experts instead of all"
        yield clause, _at(best, _softmax(own), n)
    for count in (used - 1, used + 1):
        if 0 < count <= n:
            yield f"{count} experts instead of {used}", chosen(order[:, :count])
    yield "the experts with the smallest logits chosen", chosen(order[:, ::-1][:, :used])
    yield (
        "of equal logits the highest id chosen instead of the lowest",
        chosen(n - 1 - np.argsort(-logits[:, ::-1], axis=-1, kind="stable")[:, :used]),
    )
    yield (
        f"the first {used} experts chosen, whatever their logits",
        chosen(np.broadcast_to(np.arange(used), best.shape)),
    )
    yield "the chosen experts weighted alike", _at(best, np.full(best.shape, 1 / used), n)
    yield "sigmoid instead of softmax", _at(best, 1 / (1 + np.exp(-own)), n)
    right = np.take_along_axis(chosen(best), best, axis=-1)
    yield (
        "weights in the order of size given to experts in the order of ids",
        _at(np.sort(best, axis=-1), right, n),
    )
    for by in (1, -1):
        yield "ids of experts shifted by one", _at((best + by) % n, right, n)


@hypothesis(ExpertLinear)
def matrices(case: Case, node: ExpertLinear) -> Iterator[Guess]:
    """The bias, the order of experts, another tensor, the bytes."""
    x, routed = case.inputs
    stem, n = node.name, node.experts
    weight, bias = case.weight(f"{stem}.weight"), case.weight(f"{stem}.bias")
    if weight is None:
        return
    places, taken = _places(routed, node.used)
    none = np.zeros((n, node.rows))
    own = none if bias is None else bias
    rows = x if x.ndim == 3 else np.repeat(x[:, None], node.used, axis=1)

    def product(w: Array = weight, b: Array = own, at: Chosen = places, rows: Array = rows) -> Array:
        out = np.zeros((*places.shape, node.rows))
        for expert in np.unique(at):
            here = at == expert
            out[here] = rows[here] @ w[expert].T + b[expert]
        return np.where(taken[..., None], out, 0.0)

    yield f"experts of {stem} as the file states, where the oracle's differ", product()
    if bias is not None:
        yield f"bias of {stem} left out", product(b=none)
        yield f"bias of {stem} added twice", product(b=2 * own)
        yield f"bias of expert 0 of {stem} for every expert", product(b=none + own[0])
        yield f"biases of {stem} shifted by one expert", product(b=np.roll(own, 1, axis=0))
    yield f"{stem} never loaded (zeros)", product(weight * 0)
    yield f"expert 0 of {stem} for every expert", product(at=places * 0)
    for by in (1, -1):
        yield f"experts of {stem} shifted by one", product(at=(places + by) % n)
        yield f"matrices of {stem} shifted by one expert, biases not", product(np.roll(weight, by, axis=0))
        other = case.neighbour(f"{stem}.weight", by)
        if other is not None and other.shape == weight.shape:
            yield f"{stem} of the layer {'behind' if by > 0 else 'before'}", product(other)
    by_weight = np.argsort(-np.take_along_axis(routed, places, axis=-1), axis=-1, kind="stable")
    yield (
        "experts in the order of their weights instead of their ids",
        product(at=np.take_along_axis(places, by_weight, axis=-1)),
    )
    if x.ndim == 3:
        yield (
            "every expert reads what the first one made",
            product(rows=np.repeat(x[:, :1], node.used, axis=1)),
        )
    if node.rows == node.cols:
        yield f"matrices of {stem} transposed", product(weight.swapaxes(1, 2))
    for other_node in case.nodes(ExpertLinear):
        other = case.weight(f"{other_node.name}.weight")
        near = other_node.stage.rpartition(".")[0] == node.stage.rpartition(".")[0] and other_node != node
        if near and other is not None and other.shape == weight.shape:
            yield f"{other_node.name} used instead of {stem}", product(other)
    yield from _exchanged(case, stem, places, weight, product)
    for clause, decoded in misreadings(case, f"{stem}.weight", weight.shape):
        yield f"{stem}: {clause}", product(decoded)


def _exchanged(
    case: Case, stem: str, places: Chosen, weight: Array, product: Callable[..., Array]
) -> Iterator[Guess]:
    """One expert that has another's matrix, or two that have each other's, while all others are right."""
    suspects = np.unique(places[wrong_rows(case, axes=2)]).tolist()
    every = np.arange(case.inputs[1].shape[1])
    if len(suspects) == 2:
        swapped = every.copy()
        swapped[suspects] = suspects[::-1]
        both = f"{suspects[0]} and {suspects[1]} of {stem} exchanged"
        yield f"experts {both}", product(at=swapped[places])
        yield f"matrices of experts {both}, biases not", product(weight[swapped])
    if len(suspects) == 1:
        (only,) = suspects
        for other in np.delete(every, only).tolist():
            moved = np.where(every == only, other, every)
            yield f"expert {other} of {stem} in the place of expert {only}", product(at=moved[places])
            yield f"matrix of expert {other} of {stem} for expert {only}, bias not", product(weight[moved])


@hypothesis(Experts, stages=("expert_act",))
def activation(case: Case, node: Experts) -> Iterator[Guess]:
    """Another function, the clamp, what is added to the linear half."""
    gate, up = case.inputs
    silu = ACTIVATIONS["SiLU"]
    if node.clamp is None:
        yield "gate and up exchanged", silu(up) * gate
        for name, function in ACTIVATIONS.items():
            if name != "SiLU":
                yield f"{name} instead of SiLU", function(gate) * up
        yield "clamped at 7, and one added to the linear half", _clamped(gate, up, 7.0, 7.0, 1.702, 1.0)
        return
    limit, alpha = node.clamp
    none = float("inf")
    own = f"{limit:g}"
    yield "gate and up exchanged", _clamped(up, gate, limit, limit, alpha, 1.0)
    yield "no clamp", _clamped(gate, up, none, none, alpha, 1.0)
    yield f"the gate alone clamped at {own}, the linear half not", _clamped(gate, up, limit, none, alpha, 1.0)
    yield f"the linear half alone clamped at {own}, the gate not", _clamped(gate, up, none, limit, alpha, 1.0)
    yield (
        "the linear half clamped from above alone",
        _clamped(gate, np.minimum(up, limit), limit, none, alpha, 1.0),
    )
    yield "no one added to the linear half", _clamped(gate, up, limit, limit, alpha, 0.0)
    yield "one added to the linear half before its clamp", _clamped(gate, up + 1, limit, limit, alpha, 0.0)
    yield f"alpha 1 instead of {alpha:g}", _clamped(gate, up, limit, limit, 1.0, 1.0)
    yield "SwiGLU without clamp, alpha and one", silu(gate) * up
    for other in (6.0, 10.0):
        if other != limit:
            yield f"clamped at {other:g} instead of {own}", _clamped(gate, up, other, other, alpha, 1.0)


def _clamped(gate: Array, up: Array, most: float, within: float, alpha: float, more: float) -> Array:
    """g sigmoid(alpha g) (u + more), g at most `most`, u within ±`within`."""
    g, u = np.minimum(gate, most), np.clip(up, -within, within)
    return np.asarray(g / (1 + np.exp(-alpha * g)) * (u + more))


@hypothesis(Experts, stages=("experts",))
def mixing(case: Case, node: Experts) -> Iterator[Guess]:
    """The weights of the sum."""
    down, routed = case.inputs
    places, taken = _places(routed, node.used)
    weights = np.where(taken, np.take_along_axis(routed, places, axis=-1), 0.0)

    def mixed(weights: Array) -> Array:
        return np.asarray((weights[..., None] * down).sum(axis=1))

    yield "weights as the router gave them, where the oracle's sum differs", mixed(weights)
    yield "experts added without their weights", mixed(np.sign(weights))
    yield "experts weighted alike (their mean)", mixed(np.sign(weights) / node.used)
    yield "weights applied twice", mixed(weights**2)
    yield "the first expert alone", mixed(weights * (np.arange(node.used) == 0))
    yield "the last expert left out", mixed(weights * (np.arange(node.used) < node.used - 1))
    strongest = weights == weights.max(axis=-1, keepdims=True)
    yield "the strongest expert alone", mixed(weights * strongest)
    by_size = -np.sort(-weights, axis=-1)
    yield "weights in the order of size given to experts in the order of ids", mixed(by_size)
    yield "weights in reverse order", mixed(weights[:, ::-1])
