"""Find values in a file that no sound model holds.

**Not finite.** A NaN or an infinity after dequantising; in MXFP4 also a scale of 255, which is its NaN.

**A run of zeros that pruning does not explain.** Zeros alone are no damage: pruned rows, rows of tokens that
are never used, blocks whose scale is 0. What a write that stopped leaves is a *run*. Rows are looked at in
blocks (those of the format, 16 weights otherwise), and each run of blocks with nothing but zeros, in the
order of the file and over the ends of rows, is held against chance:

    chance = places * min(order, PRUNED^L) * product of q_j over the blocks at its ends

where L rows are zero as a whole, `order` is the share of all ways to lay out this matrix' zero rows among
its rows that has those L in one place, q_j the share of zero blocks in column j of the rows that are not
zero, and `places` the number of rows where such a run could begin, times the blocks where it could begin and
end. It bounds the probability that zeros scattered over rows and over the blocks of each column lie together
like that, whatever their rate: nothing is estimated, and one sound matrix in 10^9 (CHANCE) gives a finding.
Where hardly a row is left the order says nothing; but no pruning takes more than three in four rows (PRUNED),
so longer runs than that gives are damage too. Half of all rows may be zero when they lie scattered, a column
that is zero in every row explains itself, and a dozen rows in one half of a small matrix prove nothing.

**Constant.** A matrix whose every weight is the same, while other matrices of the file vary: filled, not
read. Vectors are left alone in both: norms of 1 or 0 and biases of 0 are what training begins with.

**Out of range.** A block whose largest weight is more than 10^3 (RANGE) above every other block of its row
and above every other block of its column. Neither a row nor a column that is large as a whole gives that, and
what lies below its neighbours is as good as pruned. A row of one block is looked at in halves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, TokenType
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from prill_harness.numbers.compare import largest, smallest

CHANCE, PRUNED = 1e-9, 0.75
RANGE = 1e3
BLOCK = 16  # weights looked at together in types without blocks
STRIP = 1 << 18  # weights dequantised at a time, one row at least
FLOATS = (T.F32, T.F16)
E8M0_NAN = 0xFF

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class BadValues:
    """Weights of one tensor that are wrong.

    Attributes:
        first: index of the first one, row-major. count, size: how many of how many. what: they are, a clause.
    """

    tensor: str
    first: int
    count: int
    size: int
    what: str

    @property
    def sentence(self) -> str:
        told = f"{self.count} of {self.size} weights {self.what}"
        return f"{self.tensor}: {told}, the first at index {self.first}"


@dataclass(frozen=True)
class Survey:
    """What one walk over a tensor saw; None where nothing is wrong.

    Attributes:
        size: weights. judged: blocks that had neighbours. constant: the one value of a matrix.
        varies: more than one value besides zero.
    """

    tensor: str
    size: int
    matrix: bool
    judged: int
    not_finite: BadValues | None
    zero_run: BadValues | None
    out_of_range: BadValues | None
    constant: float | None
    varies: bool

    @property
    def zero(self) -> bool:
        return self.constant == 0.0


def strips(tensor: gguf.ReaderTensor) -> Iterator[tuple[int, Floats]]:
    """(first row, values (rows, columns)) from top to bottom; a vector is one row."""
    columns = int(tensor.shape[0])
    rows, step = tensor.n_elements // columns, max(1, STRIP // columns)
    for low in range(0, rows, step):
        yield low, values_of(tensor, low, low + step)


def values_of(tensor: gguf.ReaderTensor, low: int, high: int) -> Floats:
    """Rows low to high - 1, dequantised by gguf: (rows, columns)."""
    part = tensor.data.reshape(-1, tensor.data.shape[-1])[low:high]
    if tensor.tensor_type in FLOATS:
        return np.asarray(part, np.float32)
    with np.errstate(all="ignore"):  # scales that are not finite are the file's own, and are found below
        return np.asarray(gguf.quants.dequantize(part, tensor.tensor_type), np.float32)


def survey(tensor: gguf.ReaderTensor, unused: NDArray[np.bool_] | None = None) -> Survey:
    """Walk over a tensor once.

    Args:
        unused: of rows (row,): those that may be zero because nothing ever reads them.
    """
    columns, rows = int(tensor.shape[0]), tensor.n_elements // int(tensor.shape[0])
    per_block = GGML_QUANT_SIZES[tensor.tensor_type][0]
    width = min(per_block if per_block > 1 else BLOCK, -(-columns // 2))
    starts = np.arange(0, columns, width)
    peaks = np.empty((rows, len(starts)), np.float32)  # largest magnitude of each block
    wrong, first, low, high = 0, 0, np.inf, -np.inf
    least, most = np.inf, -np.inf  # of what is finite and not zero
    for row, values in strips(tensor):
        magnitudes = np.abs(values)
        peaks[row : row + len(values)] = np.maximum.reduceat(magnitudes, starts, axis=1)
        low, high = smallest(low, float(values.min())), largest(high, float(values.max()))
        counted = np.isfinite(values) & (values != 0)
        least = smallest(least, float(values.min(where=counted, initial=np.inf)))
        most = largest(most, float(values.max(where=counted, initial=-np.inf)))
        bad = np.flatnonzero(~np.isfinite(values.ravel()))
        if bad.size:
            first, wrong = (row * columns + int(bad[0]) if not wrong else first), wrong + bad.size
    finite = None
    if wrong:
        finite = BadValues(tensor.name, first, wrong, tensor.n_elements, "are not finite (NaN or infinity)")
    if tensor.tensor_type == T.MXFP4:  # 2^128 times a small number is finite, and still no number
        finite = _scales_of_255(tensor) or finite
    matrix = len(tensor.shape) > 1
    judged = BlockPeaks(tensor.name, rows, columns, width, peaks) if matrix else None
    zeros = judged.zero_run(unused) if judged and peaks.any() else None
    return Survey(
        tensor=tensor.name,
        size=tensor.n_elements,
        matrix=matrix,
        judged=judged.with_neighbours if judged and not finite else 0,
        not_finite=finite,
        zero_run=_to_the_weight(tensor, zeros) if zeros else None,
        out_of_range=judged.out_of_range() if judged and not finite else None,
        constant=low if low == high else None,
        varies=least < most,
    )


def _to_the_weight(tensor: gguf.ReaderTensor, run: BadValues) -> BadValues:
    """A run that was found by blocks, with the zeros before and behind it in the blocks at its ends."""
    columns = int(tensor.shape[0])
    row, last = run.first // columns, (run.first + run.count - 1) // columns
    before = values_of(tensor, max(0, row - 1), row + 1).ravel()[: run.first - max(0, row - 1) * columns]
    behind = values_of(tensor, last, last + 2).ravel()[run.first + run.count - last * columns :]
    more, rest = _leading_zeros(before[::-1]), _leading_zeros(behind)
    return replace(run, first=run.first - more, count=more + run.count + rest)


def _leading_zeros(values: Floats) -> int:
    other = np.flatnonzero(values)
    return int(other[0]) if other.size else values.size


def _scales_of_255(tensor: gguf.ReaderTensor) -> BadValues | None:
    blocks = tensor.data.reshape(-1, GGML_QUANT_SIZES[T.MXFP4][1])
    bad = np.flatnonzero(blocks[:, 0] == E8M0_NAN)
    if not bad.size:
        return None
    what = "have a scale that is not finite (255, NaN)"
    per_block = tensor.n_elements // len(blocks)
    return BadValues(tensor.name, int(bad[0]) * per_block, bad.size * per_block, tensor.n_elements, what)


@dataclass(frozen=True)
class BlockPeaks:
    """The blocks of a matrix.

    Attributes:
        width: weights of a block. peaks: largest magnitude of each block (row, block).
    """

    tensor: str
    rows: int
    columns: int
    width: int
    peaks: Floats

    def _weight(self, block: int) -> int:
        """Index of the first weight of a block, counted through all rows; one past the end for the last."""
        row, column = divmod(block, self.peaks.shape[1])
        return int(row * self.columns + column * self.width)

    def zero_run(self, unused: NDArray[np.bool_] | None = None) -> BadValues | None:
        """The run of zeros that chance explains least, when chance hardly ever gives it."""
        kept = np.flatnonzero(~unused) if unused is not None else np.arange(self.rows)
        zeros = self.peaks[kept] == 0  # (row, block)
        n, per_row = zeros.shape
        edges = np.flatnonzero(np.diff(np.concatenate(([False], zeros.ravel(), [False])).astype(np.int8)))
        begin, end = edges[::2], edges[1::2]
        if not begin.size:
            return None
        whole = zeros.all(axis=1)
        # Rows first..last-1 of each run are zero as a whole; what is left of it lies in the rows at its ends.
        first, last = -(-begin // per_row), end // per_row
        length = np.maximum(last - first, 0)
        zero_rows, used = int(whole.sum()), max(int((~whole).sum()), 1)
        in_column = np.maximum(zeros[~whole].sum(axis=0), 1)
        logs = np.concatenate(([0.0], np.cumsum(np.log(in_column / used))))  # (block + 1,)
        inside = first > last  # begins and ends within one row
        head = np.where(begin % per_row, logs[-1] - logs[begin % per_row], 0.0)
        tail = logs[end % per_row]
        ends = np.where(inside, logs[end % per_row] - logs[begin % per_row], head + tail)
        factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n + 1)))))
        order = factorial[zero_rows] - factorial[zero_rows - length] - factorial[n] + factorial[n - length]
        aligned = (begin % per_row == 0) & (end % per_row == 0)
        places = np.log((n - length + 1) * np.where(aligned, 1, per_row**2))
        chance = places + np.minimum(order, length * np.log(PRUNED)) + ends
        worst = int(chance.argmin())
        if chance[worst] > np.log(CHANCE):
            return None
        at, to = (int(kept[b // per_row] * per_row + b % per_row) for b in (begin[worst], end[worst] - 1))
        start, stop = self._weight(at), min(self._weight(to) + self.width, (to // per_row + 1) * self.columns)
        rows = f"rows {at // per_row} to {to // per_row} of {self.rows}"
        what = f"are zero in a run that pruning does not explain, {rows}"
        return BadValues(self.tensor, start, stop - start, self.rows * self.columns, what)

    @property
    def with_neighbours(self) -> int:
        """Blocks that have something to be compared with."""
        return self.peaks.size if min(self.peaks.shape) > 1 else 0

    def out_of_range(self) -> BadValues | None:
        """Blocks far above all others of their row and of their column."""
        if not self.with_neighbours:
            return None
        beside, above = (_largest_other(self.peaks, axis) for axis in (1, 0))
        others = np.maximum(beside, above)
        far = np.flatnonzero((self.peaks > RANGE * others) & (beside > 0) & (above > 0))
        if not far.size:
            return None
        at = int(far[0])
        ratio = self.peaks.flat[at] / others.flat[at]
        what, size = f"have a block scale {ratio:,.0f} times those around it", self.rows * self.columns
        return BadValues(self.tensor, self._weight(at), min(far.size * self.width, size), size, what)


def _largest_other(peaks: Floats, axis: int) -> Floats:
    """For each block the largest of all others along the axis."""
    top = np.partition(peaks, -2, axis=axis).take([-2, -1], axis=axis)
    second, best = top.take([0], axis=axis), top.take([1], axis=axis)
    return np.where(peaks == best, second, best)


# What vocabularies are filled up with: <unused7>, [PAD151646], <|reserved_special_token_3|>, [control_9]
_FILLER = re.compile(
    r"[<\[]\W*(unused|reserved|pad|padding|extra|dummy|placeholder|blank|empty|special|control)"
    r"(?![a-z])[\W\w]*[>\]]",
    re.IGNORECASE,
)


def unused_tokens(fields: Mapping[str, Any], rows: int) -> NDArray[np.bool_]:
    """Rows of an embedding table (row,) that no text reaches: tokens typed UNUSED, named as filling, or none.

    Args:
        fields: metadata of the file, by key.
    """
    tokens = fields.get("tokenizer.ggml.tokens", ())
    types = fields.get("tokenizer.ggml.token_type", ())
    unused = np.ones(rows, np.bool_)
    for row, token in enumerate(tokens[:rows]):
        typed = row < len(types) and int(types[row]) == TokenType.UNUSED
        unused[row] = typed or bool(_FILLER.match(str(token)))
    return unused if len(tokens) else np.zeros(rows, np.bool_)


def constants(surveys: Iterable[Survey]) -> list[BadValues]:
    """Matrices of one value (not zero) in a file of which another varies; pruned zeros are no variety."""
    matrices = [s for s in surveys if s.matrix and s.size > 1]
    if not any(s.varies for s in matrices):
        return []
    return [
        BadValues(s.tensor, 0, s.size, s.size, f"are constant, {s.constant:.6g} throughout")
        for s in matrices
        if s.constant  # neither None nor zero, which has a sentence of its own
    ]
