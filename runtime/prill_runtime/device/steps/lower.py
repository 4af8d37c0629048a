"""A model's nodes come in; one token's way through them, fused kernels where they cover a node, goes out.

`lower(node, on)` gives the fused piece of a kind of node where the kernels have its options, and None where
they have not: the node then records itself through ops, beside fused ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, singledispatch
from typing import Any, Final

from prill_runtime.device.machine.base import Pointer
from prill_runtime.device.memory.array import DeviceArray, grid_of
from prill_runtime.device.memory.matrix import DeviceMatrix
from prill_runtime.device.ops.backend import CudaBackend
from prill_runtime.device.steps.launches import GROUP, MOST_DIM, Heads, attend, product
from prill_runtime.models.base import Node
from prill_runtime.models.load import Wired
from prill_runtime.models.nodes import Attention, Dense, Embed, Head, Linear, Norm, Pass, RmsNorm, Rope

# Takes the stream (1, width) and gives it back with what the node adds to it.
Piece = Callable[[Any, DeviceArray], DeviceArray]
WHOLE: Final = 32  # values that are quantised together: rows are whole numbers of them


class Lowering:
    """What the pieces of a model share: its weights, buffers of one token, the angles of its position."""

    def __init__(self, model: Wired, ops: CudaBackend) -> None:
        self.weights: Any = model.weights
        self.ops, self.width = ops, model.network.width
        nodes = list(model.network.walk())
        inner = [node.heads * node.size for node in nodes if isinstance(node, Attention)]
        self.x, self.q, self.mixed, self.act = (
            ops.empty(1, width, purpose="scratch")
            for width in (
                self.width,
                max(inner),
                max(inner),
                max(node.up.rows for node in nodes if isinstance(node, Dense)),
            )
        )
        # Of the rotations, the one whose angles the first launch makes.
        self.rope = next((node for node in nodes if isinstance(node, Rope)), None)
        if self.rope is not None:
            self.frequencies = ops.frequencies(**self.rope.settings(self.weights))
            self.turns = ops.empty(1, self.rope.dim // 2, 2, purpose="scratch")
        self.begins = False

    def matrix(self, linear: Linear | Head | Embed) -> DeviceMatrix:
        found: DeviceMatrix = self.weights[f"{linear.name}.weight"]
        return found

    def norm(self, norm: Norm) -> Pointer:
        found: Pointer = self.weights[f"{norm.name}.weight"].pointer
        return found

    def angles(self, p: Pass, rope: Rope) -> Pointer:
        """Cosines and sines (pair, 2) of the token's position."""
        if self.begins and rope == self.rope:
            return self.turns.pointer
        settings: Any = rope.settings(self.weights)
        at: Any = p.step.positions
        return self.ops.angles(
            at, settings["base"], settings["dim"], settings["factor"], settings["freq_factors"]
        ).pointer


class Lowered:
    """One token's way through a model.

    Attributes:
        recorded: nodes without a fused piece. any_reach: the launches are the same wherever in a sequence the
            token stands.
    """

    def __init__(self, model: Wired, ops: CudaBackend) -> None:
        network, on = model.network, Lowering(model, ops)
        self.recorded: list[Node] = []

        def piece(node: Attention | Dense) -> Piece:
            found = lower(node, on)
            if found is None:
                self.recorded.append(node)
                return partial(_added, node)
            return found  # type: ignore[no-any-return]

        self._embed = lower(network.embed, on)
        if self._embed is None:
            self._embed = network.embed
            self.recorded.append(network.embed)
        self._pieces: list[Piece] = []
        for layer in network.layers:
            self._pieces += [piece(layer.attention), piece(layer.dense)]
            if isinstance(self._pieces[-2], FusedAttention) and isinstance(self._pieces[-1], FusedDense):
                self._pieces[-2].ahead = self._pieces[-1].first
        self._tail = FusedTail(network.norm, network.head, on)
        if not self._tail.covered:
            self.recorded += [network.norm, network.head]
        self.any_reach = not any(isinstance(node, Attention) for node in self.recorded)

    def __call__(self, p: Pass, logits: DeviceArray) -> None:
        """Queue the launches of the step's one id, to logits (1, vocab)."""
        x = self._embed(p)
        for piece in self._pieces:
            x = piece(p, x)
        self._tail(p, x, logits)


def _added(node: Attention | Dense, p: Any, x: Any) -> Any:
    """The stream with what a node adds to it, by single ops."""
    return p.ops.add(x, node(p, x))


@singledispatch
def lower(node: Node, on: Lowering) -> Any:
    """The fused piece of a node; None where the kernels do not cover it."""
    return None


@lower.register
def _(node: Embed, on: Lowering) -> Any:
    return Begin(node, on) if node.positions is None else None


@lower.register
def _(node: Attention, on: Lowering) -> Any:
    if node.rope is None or node.rope.layout != "norm" or node.size % 4 or node.size > MOST_DIM:
        return None
    if node.heads // node.kv_heads > GROUP or not _plain(on, node.norm, node.q, node.k, node.v, node.out):
        return None
    return FusedAttention(node, on)


@lower.register
def _(node: Dense, on: Lowering) -> Any:
    if node.gate is None or node.up.rows % WHOLE or not _plain(on, node.norm, node.gate, node.up, node.down):
        return None
    return FusedDense(node, on) if on.matrix(node.gate).kind == on.matrix(node.up).kind else None


def _plain(on: Lowering, norm: Norm, *linears: Linear) -> bool:
    """Whether a norm and what it feeds are as the kernels take them."""
    matrices = all(isinstance(on.matrix(linear), DeviceMatrix) for linear in linears)
    simple = not any(linear.bias or linear.of is not None for linear in linears)
    return matrices and simple and isinstance(norm, RmsNorm) and norm.width % WHOLE == 0


class Begin:
    """The first launch: the row of the id, and the angles of its position."""

    def __init__(self, node: Embed, on: Lowering) -> None:
        self.node, self.on = node, on
        on.begins = True

    def __call__(self, p: Pass) -> DeviceArray:
        on, table, step = self.on, self.on.matrix(self.node), p.step
        ids, positions, turned = _pointer(step.ids), _pointer(step.positions), on.rope is not None
        args = {"table": table.fields, "id": ids, "out": on.x.pointer, "position": positions,
                "frequencies": on.frequencies.pointer if turned else 0,
                "angles": on.turns.pointer if turned else 0,
                "pairs": on.rope.dim // 2 if on.rope is not None else 0}  # fmt: skip
        on.ops.device.launch(f"begin_{table.kind}", (grid_of(table.pitch, 64)[0] + 1,), 64, args)
        return on.x


class FusedAttention:
    """Norm, projections, rotation and cache in one launch, or in one for each type; attention; projection."""

    def __init__(self, node: Attention, on: Lowering) -> None:
        self.node, self.on = node, on
        self.ahead: tuple[DeviceMatrix, ...] = ()  # what the piece behind it reads first

    def __call__(self, p: Pass, x: DeviceArray) -> DeviceArray:
        a, on = self.node, self.on
        assert a.rope is not None
        cache: Any = p.step.sequences[0][0]
        heads = Heads(cache.state, on.angles(p, a.rope), a.layer, a.size, a.kv_heads, a.rope.dim // 2)
        q, k, v = (on.matrix(linear) for linear in (a.q, a.k, a.v))
        queue = partial(product, on.ops, "qkv", (q, k, v), x, on.q, norm=on.norm(a.norm), eps=a.norm.eps,
                        heads=heads)  # fmt: skip
        if q.kind == k.kind == v.kind:
            queue()
        else:
            for part in range(3):
                queue(only=part)
        attend(on.ops.device, a, cache.state, on.q.pointer, on.mixed.pointer, self.ahead)
        product(on.ops, "plain", (on.matrix(a.out),), on.mixed, x, residual=x)
        return x


class FusedDense:
    """Norm, gate, up and activation in one launch; down in another."""

    def __init__(self, node: Dense, on: Lowering) -> None:
        assert node.gate is not None
        self.node, self.on = node, on
        self.first = (on.matrix(node.gate), on.matrix(node.up))

    def __call__(self, p: Pass, x: DeviceArray) -> DeviceArray:
        d, on = self.node, self.on
        product(on.ops, "gate_up", self.first, x, on.act, norm=on.norm(d.norm), eps=d.norm.eps)
        product(on.ops, "plain", (on.matrix(d.down),), on.act, x, residual=x)
        return x


class FusedTail:
    """The last norm and the head in one launch where they are `covered`, else by single ops."""

    def __init__(self, norm: Norm, head: Head, on: Lowering) -> None:
        self.norm, self.head, self.on = norm, head, on
        self.covered = isinstance(norm, RmsNorm) and norm.width % WHOLE == 0

    def __call__(self, p: Any, x: DeviceArray, logits: DeviceArray) -> None:
        on, matrix = self.on, self.on.matrix(self.head)
        if self.covered:
            product(on.ops, "plain", (matrix,), x, logits, norm=on.norm(self.norm), eps=self.norm.eps)
        else:
            on.ops.linear(self.norm(p, x), matrix, out=logits)  # type: ignore[arg-type]


def _pointer(ids: Any) -> Pointer:
    """Where the one id of a step lies."""
    return int(ids.pointer)
