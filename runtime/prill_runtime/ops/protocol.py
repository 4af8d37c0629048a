"""The interface of a backend: every op that forward passes need, on arrays and explicit arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prill_runtime.gguf.tensors import TensorInfo

Array: TypeAlias = NDArray[np.floating[Any]]
Ids: TypeAlias = NDArray[np.int64]
RopeLayout: TypeAlias = Literal["norm", "neox"]

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    A = TypeVar("A", default=Array)
    W = TypeVar("W", default=A)
    C = TypeVar("C", contravariant=True, default=A)
else:  # Python 3.11 knows no defaults
    from typing import TypeVar

    A, W, C = TypeVar("A"), TypeVar("W"), TypeVar("C", contravariant=True)


class Yarn(NamedTuple):
    """Rotary scaling by frequency (YaRN, Peng et al. 2023).

    Attributes:
        original: positions that the model was trained on. fast, slow: turns over these from which on a pair
            is left as it is, and up to which it is interpolated wholly. truncate: whether the pairs that have
            so many turns are rounded outwards to whole ones.
    """

    original: int
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True


class Backend(Protocol[A, W, C]):
    """What a backend owes: all arithmetic of a forward pass, with nothing hidden between the calls.

    A is the type of its activations, W of its weights, C of the keys and values that attention reads: host
    arrays all three, where nothing else is said.

    Activations are (row, …): the rows of all sequences of a step, one below the other. Every op returns a
    new array of the backend's dtype and leaves its arguments as they were. A wrapper that changes one
    argument or one result is therefore a complete description of a fault.
    """

    name: str
    dtype: np.dtype[Any]

    def weight(self, raw: NDArray[np.uint8], info: TensorInfo) -> W:
        """The tensor of shape `info.shape` from its bytes in the file; it owns its memory."""
        ...

    def is_zero(self, weight: W) -> bool:
        """Whether every element is zero."""
        ...

    def embed(self, table: W, ids: Ids) -> A:
        """Rows of a table (vocab, width) for ids (row,): (row, width). Also looks up learned positions."""
        ...

    def rms_norm(self, x: A, weight: W, eps: float) -> A:
        """x / sqrt(mean(x²) + eps) · weight over the last axis (Zhang and Sennrich 2019)."""
        ...

    def layer_norm(self, x: A, weight: W, bias: W, eps: float) -> A:
        """(x − mean) / sqrt(var + eps) · weight + bias, var over n, last axis (Ba et al. 2016)."""
        ...

    def linear(self, x: A, weight: W, bias: W | None = None) -> A:
        """x (row, in) · weightᵀ + bias, weight (out, in), bias (out,): (row, out)."""
        ...

    def rope(
        self,
        x: A,
        positions: Ids,
        *,
        base: float,
        dim: int,
        layout: RopeLayout,
        factor: float = 1.0,
        freq_factors: W | None = None,
        yarn: Yarn | None = None,
        scale: float = 1.0,
        long: tuple[W, int] | None = None,
    ) -> A:
        """Rotate the first `dim` components of each head of x (row, head, head_dim) (Su et al. 2021).

        Pair i of a row turns by position · base^(−2i/dim) / factor / freq_factors[i]. The pair is
        (2i, 2i+1) in layout "norm" and (i, i + dim/2) in layout "neox". `factor` is linear position
        interpolation, or with `yarn` that of its slow pairs; `freq_factors` (dim/2,) are the per-frequency
        divisors of a file's rope_freqs. Cosines and sines are multiplied by `scale`. `long` (divisors, n):
        in place of freq_factors, where the rows, which are then of one sequence, go beyond n positions
        (LongRoPE, Ding et al. 2024).
        """
        ...

    def temper(self, x: A, positions: Ids, *, beta: float, original: int) -> A:
        """x (row, …) · (1 + beta · ln(1 + ⌊position / original⌋)): late queries are sharper (Llama 4)."""
        ...

    def softmax(self, x: A) -> A:
        """exp(x − max) / Σ over the last axis; −inf gives 0; a row of nothing but −inf gives NaN."""
        ...

    def attention(
        self,
        q: A,
        k: C,
        v: C,
        *,
        start: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: W | None = None,
    ) -> A:
        """Causal attention of new rows over one sequence's cache.

        Args:
            q: (row, head, head_dim). k, v: (kv_head, length, head_dim), length = start + rows.
            start: cache rows before the first row of q; row i sees keys j ≤ start + i.
            scale: factor on q·k. window: row i sees only keys j > start + i − window.
            softcap: a scaled score s becomes softcap · tanh(s / softcap) before the mask.
            sinks: (head,), a score of no key that takes its part of the softmax's sum.

        Query head h reads cache head h // (heads / kv_heads). Returns (row, head · head_dim).
        """
        ...

    def swiglu(self, gate: A, up: A) -> A:
        """gate · sigmoid(gate) · up (Shazeer 2020)."""
        ...

    def swiglu_clamped(self, gate: A, up: A, *, limit: float, alpha: float) -> A:
        """g · sigmoid(alpha · g) · (u + 1), g = min(gate, limit), u = up within ±limit (gpt-oss)."""
        ...

    def geglu(self, gate: A, up: A) -> A:
        """gelu_tanh(gate) · up (Shazeer 2020)."""
        ...

    def gelu_tanh(self, x: A) -> A:
        """x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))) (Hendrycks and Gimpel 2016)."""
        ...

    def gelu_erf(self, x: A) -> A:
        """x/2 · (1 + erf(x/√2)) (Hendrycks and Gimpel 2016)."""
        ...

    def scale(self, x: A, by: float) -> A:
        """x · by."""
        ...

    def softcap(self, x: A, cap: float) -> A:
        """cap · tanh(x / cap): values within ±cap (Gemma 2)."""
        ...

    def route(self, logits: A, *, used: int, normalised: bool) -> A:
        """Weights (row, expert) of the `used` experts with the largest logits (row, expert), 0 for the rest.

        Of equal logits the lower id is taken. `normalised`: the softmax is over the chosen, else over all.
        """
        ...

    def expert_linear(self, x: A, weight: W, routed: A, *, used: int, bias: W | None = None) -> A:
        """Each row times the matrices of its experts: (row, used, out), by ascending expert.

        Args:
            x: (row, in), or (row, used, in) with a row for each of the experts. weight: (expert, out, in).
            routed: (row, expert), not 0 for at most `used` experts of a row; what is left over is 0.
            bias: (expert, out).
        """
        ...

    def mix(self, x: A, routed: A) -> A:
        """Σ over a row's experts, ascending, of their weight in routed (row, expert) · x (row, used, out)."""
        ...

    def add(self, a: A, b: A) -> A:
        """a + b: the residual connection."""
        ...

    def concatenate(self, arrays: Sequence[A]) -> A:
        """The rows of all arrays (row, …), one below the other."""
        ...
