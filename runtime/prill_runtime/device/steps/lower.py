"""Lower a model's nodes to the launches of one token, by fused kernels where they cover a node.

`lower(node, on)` returns the fused piece of a node if the kernels have its options, and None if not; such a
node is then recorded through single ops, beside fused ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, singledispatch
from itertools import pairwise
from typing import Any, Final

from prill_runtime.device.machine.base import Pointer
from prill_runtime.device.memory.array import DeviceArray, grid_of
from prill_runtime.device.memory.matrix import DeviceMatrix
from prill_runtime.device.ops.backend import CudaBackend
from prill_runtime.device.steps.launches import (
    MOST_EXPERTS,
    MOST_HEAD_DIM,
    MOST_QUERY_HEADS,
    MOST_USED,
    NO_HEAD_NORMS,
    PREFETCH_BYTES,
    HeadNorms,
    Heads,
    Hooks,
    add_normed,
    attend,
    mixture,
    product,
    route,
)
from prill_runtime.models.base import Node, Pass
from prill_runtime.models.load import Wired
from prill_runtime.models.nodes.attention import Attention
from prill_runtime.models.nodes.experts import ExpertLinear, Experts
from prill_runtime.models.nodes.feedforward import Dense
from prill_runtime.models.nodes.linear import Linear
from prill_runtime.models.nodes.network import Embed, Head
from prill_runtime.models.nodes.norms import LayerNorm, Norm, RmsNorm
from prill_runtime.models.nodes.rope import Rope

# Takes the residual stream (1, width) and returns it with what the node adds.
Piece = Callable[[Any, DeviceArray], DeviceArray]
WHOLE: Final = (
    16 << 20
)  # bytes of half an output matrix that attention prefetches where routing comes after it
GELU: Final = {"gelu_tanh": 1, "gelu_erf": 2}
BLOCK_VALUES: Final = 32  # values that are quantised together: rows are whole numbers of them


class Lowering:
    """What the pieces of a model share: its weights, one token's buffers, the angles of its position."""

    def __init__(self, model: Wired, ops: CudaBackend) -> None:
        self.weights: Any = model.weights
        self.ops, self.width = ops, model.network.width
        nodes = list(model.network.walk())
        inner = [node.heads * node.size for node in nodes if isinstance(node, Attention)]
        wide = [node.up.rows for node in nodes if isinstance(node, Dense)]
        mixtures = [node for node in nodes if isinstance(node, Experts)]
        wide += [node.used * node.up.rows for node in mixtures]
        routed = max((node.router.rows for node in mixtures), default=1)
        self.x, self.added, self.q, self.mixed, self.act, self.routed = (
            ops.empty(1, width, purpose="scratch")
            for width in (self.width, self.width, max(inner), max(inner), max(wide), routed)
        )
        # The rotation whose angles the first launch computes: it has one table.
        plain = (node for node in nodes if isinstance(node, Rope) and node.long is None)
        self.rope = next(plain, None)
        if self.rope is not None:
            settings = self.rope.settings(self.weights)
            settings.pop("scale", None)
            self.frequencies = ops.frequencies(**settings)
            self.turns = ops.empty(1, self.rope.dim // 2, 2, purpose="scratch")

    def matrix(self, linear: Linear | ExpertLinear | Head | Embed) -> DeviceMatrix:
        found: DeviceMatrix = self.weights[f"{linear.name}.weight"]
        if isinstance(linear, Linear) and linear.of is not None:
            return found.part(linear.first, linear.rows)
        return found

    def norm(self, norm: Norm) -> dict[str, Any]:
        """Arguments for the norm that a launch applies before its product."""
        return {"norm": self.weights[f"{norm.stem}.weight"].pointer, "eps": norm.eps}

    def bias(self, name: str, first: int = 0) -> Pointer:
        """Address of a bias from a row on; 0 if there is none."""
        found = self.weights.get(f"{name}.bias")
        if found is None:
            return 0
        return (found.pointers["q"] if isinstance(found, DeviceMatrix) else int(found.pointer)) + 4 * first

    def hooks(self, norm: Norm | None, *linears: Linear, needed: bool = False) -> Hooks | None:
        """The parts of a launch's norm and matrices that need a kernel with hooks; None if there are none."""
        biases = [self.bias(linear.name, linear.first) for linear in linears]
        centred = self.bias(norm.stem) if isinstance(norm, LayerNorm) else 0
        if not (needed or centred or any(biases)):
            return None
        self.ops.device.module("hooked")
        return Hooks(centred, *biases)

    def add(
        self, linear: Linear, post: Norm | None, of: DeviceArray, x: DeviceArray, hooks: Hooks | None
    ) -> None:
        """Queue the end of a branch: its last matrix, the norm behind it if any, the sum with the stream."""
        matrices = (self.matrix(linear),)
        if post is None:
            product(self.ops, "plain", matrices, of, x, residual=x, hooks=hooks)
        else:
            product(self.ops, "plain", matrices, of, self.added, hooks=hooks)
            add_normed(self.ops.device, self.added, x=x, **self.norm(post))

    def angles(self, p: Pass, rope: Rope) -> Pointer:
        """Cosines and sines (pair, 2) of the token's position."""
        if rope == self.rope:
            return self.turns.pointer
        at: Any = p.step.positions
        return self.ops.angles(at, **rope.settings(self.weights)).pointer


class Lowered:
    """The launches that take one token through a model.

    Attributes:
        recorded: nodes without a fused piece. any_reach: whether the launches are the same at every position.
    """

    def __init__(self, model: Wired, ops: CudaBackend) -> None:
        network, on = model.network, Lowering(model, ops)
        self.recorded: list[Node] = []

        def piece(node: Attention | Dense | Experts) -> Piece:
            found = lower(node, on)
            if found is None:
                self.recorded.append(node)
                return partial(_added, node)
            return found  # type: ignore[no-any-return]

        self._embed = Begin(network.embed, on)
        self._pieces: list[Piece] = []
        for layer in network.layers:
            if layer.parallel:
                attention, dense = lower(layer.attention, on), lower(layer.dense, on)
                if isinstance(attention, FusedAttention) and isinstance(dense, FusedDense):
                    self._pieces.append(SideBySide(attention, dense))
                else:
                    self.recorded += [layer.attention, layer.dense]
                    self._pieces.append(layer)  # type: ignore[arg-type]
                continue
            self._pieces += [piece(layer.attention), piece(layer.dense)]
        for before, after in pairwise(self._pieces):
            if isinstance(before, FusedAttention) and isinstance(after, FusedDense):
                before.ahead = after.first
            elif isinstance(before, FusedAttention) and isinstance(after, FusedExperts):
                before.ahead, before.most = (on.matrix(before.node.out),), WHOLE
            elif isinstance(before, FusedExperts) and isinstance(after, FusedAttention):
                before.ahead = on.matrix(after.node.q)
        self._tail = FusedTail(network.norm, network.head, on)
        if not self._tail.covered:
            self.recorded += [network.norm, network.head]
        self.any_reach = not any(isinstance(node, Attention) for node in self.recorded)

    def __call__(self, p: Pass, logits: DeviceArray) -> None:
        """Queue the launches for the step's one id, up to logits (1, vocab)."""
        x = self._embed(p)
        for piece in self._pieces:
            x = piece(p, x)
        self._tail(p, x, logits)


def _added(node: Attention | Dense | Experts, p: Any, x: Any) -> Any:
    """The stream with what a node adds to it, computed by single ops."""
    return p.ops.add(x, node(p, x))


@singledispatch
def lower(node: Node, on: Lowering) -> Any:
    """The fused piece of a node; None if the kernels do not cover it."""
    return None


@lower.register
def _(node: Attention, on: Lowering) -> Any:
    norms = {(type(norm), norm and norm.eps) for norm in (node.q_norm, node.k_norm)}
    if len(norms) > 1 or isinstance(node.q_norm, LayerNorm) or isinstance(node.post, LayerNorm):
        return None
    if (
        node.size % 4
        or node.size > MOST_HEAD_DIM
        or node.heads // node.kv_heads > MOST_QUERY_HEADS
        or node.norm.width % BLOCK_VALUES
    ):
        return None
    return FusedAttention(node, on)


@lower.register
def _(node: Dense, on: Lowering) -> Any:
    if node.up.rows % BLOCK_VALUES or node.norm.width % BLOCK_VALUES:
        return None
    alike = node.gate is None or on.matrix(node.gate).kind == on.matrix(node.up).kind
    return FusedDense(node, on) if alike and not isinstance(node.post, LayerNorm) else None


@lower.register
def _(node: Experts, on: Lowering) -> Any:
    parts = (node.gate, node.up, node.down)
    biases = [on.weights.get(f"{part.name}.bias") for part in parts]
    alike = on.matrix(node.gate).kind == on.matrix(node.up).kind
    covered = alike and isinstance(node.norm, RmsNorm) and node.router.of is None
    covered &= node.used <= MOST_USED and node.router.rows <= MOST_EXPERTS
    covered &= all(part.rows % BLOCK_VALUES == 0 and part.cols % BLOCK_VALUES == 0 for part in parts)
    covered &= all(bias is None or bias.kind == "f32" for bias in biases)
    return FusedExperts(node, on) if covered else None


class Begin:
    """Embedding row and angles in one launch; a learned position in another."""

    def __init__(self, node: Embed, on: Lowering) -> None:
        self.node, self.on = node, on

    def __call__(self, p: Pass) -> DeviceArray:
        on, table, step = self.on, self.on.matrix(self.node), p.step
        ids, positions, turned = _pointer(step.ids), _pointer(step.positions), on.rope is not None
        args = {"table": table.fields, "id": ids, "out": on.x.pointer, "position": positions,
                "frequencies": on.frequencies.pointer if turned else 0,
                "angles": on.turns.pointer if turned else 0,
                "pairs": on.rope.dim // 2 if on.rope is not None else 0,
                "scale": on.rope.scale if on.rope is not None else 1.0}  # fmt: skip
        on.ops.device.launch(f"begin_{table.kind}", (grid_of(table.pitch, 64)[0] + 1,), 64, args)
        if self.node.scale is not None:
            on.ops.scale(on.x, self.node.scale, on.x)
        if self.node.positions is not None:
            learned = on.weights[f"{self.node.positions}.weight"]
            args = {"table": learned.fields, "id": positions, "out": on.x.pointer}
            on.ops.device.launch(f"add_row_{learned.kind}", grid_of(learned.pitch, 64), 64, args)
        return on.x


class FusedAttention:
    """Norm, projections, rotation and cache in one launch, or one per type; attention; output projection.

    Where heads have norms, attention does these and the rotation.
    """

    def __init__(self, node: Attention, on: Lowering) -> None:
        self.node, self.on = node, on
        # What a later launch reads: the next piece, or the output projection where that has to route first.
        self.ahead: tuple[DeviceMatrix, ...] = ()
        self.most = PREFETCH_BYTES
        self.parts = (node.q, node.k, node.v)
        self.neox = node.rope is not None and node.rope.layout == "neox"
        neox = self.neox and node.q_norm is None
        self.hooks = on.hooks(node.norm, *self.parts, needed=neox)
        if self.hooks is not None:
            self.hooks = self.hooks._replace(neox=int(neox))
        self.sinks = 0 if node.sinks is None else on.weights[node.sinks].pointer
        self.last = on.hooks(None, node.out)

    def __call__(self, p: Pass, x: DeviceArray) -> DeviceArray:
        a, on = self.node, self.on
        cache: Any = p.step.sequences[0][0]
        angles, pairs = (0, 0) if a.rope is None else (on.angles(p, a.rope), a.rope.dim // 2)
        norms = NO_HEAD_NORMS
        if a.q_norm is not None and a.k_norm is not None:
            q_norm, k_norm = (on.norm(norm)["norm"] for norm in (a.q_norm, a.k_norm))
            norms = HeadNorms(q_norm, k_norm, angles, a.q_norm.eps, pairs, int(self.neox))
            angles = pairs = 0
        heads = Heads(cache.state, angles, a.layer, a.size, a.kv_heads, pairs)
        matrices = tuple(on.matrix(linear) for linear in self.parts)
        queue = partial(
            product, on.ops, "qkv", matrices, x, on.q, heads=heads, hooks=self.hooks, **on.norm(a.norm)
        )
        if len({matrix.kind for matrix in matrices}) == 1:
            queue()
        else:
            for part in range(3):
                queue(only=part)
        attend(
            on.ops.device, a, cache.state, on.q.pointer, on.mixed.pointer, self.ahead, self.most, self.sinks,
            norms,
        )  # fmt: skip
        on.add(a.out, a.post, on.mixed, x, self.last)
        return x


class FusedDense:
    """Norm, gate if any, up and activation in one launch; down in another."""

    def __init__(self, node: Dense, on: Lowering) -> None:
        self.node, self.on = node, on
        linears = (node.up,) if node.gate is None else (node.gate, node.up)
        self.mode, gelu = "plain" if node.gate is None else "gate_up", GELU.get(node.activation, 0)
        self.first = tuple(on.matrix(linear) for linear in linears)
        self.hooks = on.hooks(node.norm, *linears, needed=gelu > 0)
        if self.hooks is not None:
            self.hooks = self.hooks._replace(gelu=gelu)
        self.last = on.hooks(None, node.down)

    def __call__(self, p: Pass, x: DeviceArray) -> DeviceArray:
        self.begin(x)
        return self.end(x)

    def begin(self, x: DeviceArray) -> None:
        """Queue what reads the stream."""
        on = self.on
        product(on.ops, self.mode, self.first, x, on.act, hooks=self.hooks, **on.norm(self.node.norm))

    def end(self, x: DeviceArray) -> DeviceArray:
        """Queue what adds to it."""
        self.on.add(self.node.down, self.node.post, self.on.act, x, self.last)
        return x


class SideBySide:
    """A parallel layer: the feed-forward layer reads the stream before attention adds to it."""

    def __init__(self, attention: FusedAttention, dense: FusedDense) -> None:
        self.attention, self.dense = attention, dense
        attention.ahead = (dense.on.matrix(dense.node.down),)

    def __call__(self, p: Pass, x: DeviceArray) -> DeviceArray:
        self.dense.begin(x)
        return self.dense.end(self.attention(p, x))


class FusedExperts:
    """Router in one launch; norm, gate, up and activation of the chosen experts in another; down of these and
    their sum in a third."""

    def __init__(self, node: Experts, on: Lowering) -> None:
        self.node, self.on = node, on
        self.ahead: DeviceMatrix | None = None  # what the next piece reads first
        on.ops.device.module("experts_decode")

    def __call__(self, p: Pass, x: DeviceArray) -> DeviceArray:
        e, on = self.node, self.on
        norm = on.norm(e.norm)
        route(on.ops, on.matrix(e.router), x, on.routed, bias=on.bias(e.router.name), **norm)
        for parts, source, to, more in (
            ((e.gate, e.up), x, on.act, {**norm, "ahead": on.matrix(e.down)}),
            ((e.down,), on.act, x, {"residual": x, "ahead": self.ahead}),
        ):
            matrices = tuple(on.matrix(part) for part in parts)
            biases = tuple(on.bias(part.name) for part in parts)
            mixture(on.ops, e, matrices, biases, on.routed, source, to, **more)
        return x


class FusedTail:
    """The last norm and the head: in one launch if `covered`, else by single ops."""

    def __init__(self, norm: Norm, head: Head, on: Lowering) -> None:
        self.norm, self.head, self.on = norm, head, on
        self.covered = norm.width % BLOCK_VALUES == 0 and not head.bias
        self.hooks = on.hooks(norm)

    def __call__(self, p: Any, x: DeviceArray, logits: DeviceArray) -> None:
        on, matrix = self.on, self.on.matrix(self.head)
        if self.covered:
            product(on.ops, "plain", (matrix,), x, logits, hooks=self.hooks, **on.norm(self.norm))
            if self.head.softcap is not None:
                on.ops.softcap(logits, self.head.softcap, logits)
        else:
            to_logits(on.ops, self.head, on.weights, self.norm(p, x), logits)  # type: ignore[arg-type]


def to_logits(ops: CudaBackend, head: Head, weights: Any, hidden: Any, out: DeviceArray) -> None:
    """Queue a head's logits (row, vocab) of hidden states, to `out`."""
    ops.linear(hidden, weights[f"{head.name}.weight"], weights.get(f"{head.name}.bias"), out=out)
    if head.softcap is not None:
        ops.softcap(out, head.softcap, out)


def _pointer(ids: Any) -> Pointer:
    """Address of a step's one id."""
    return int(ids.pointer)
