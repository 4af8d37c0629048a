"""Sampling on the device: the id that `sampler.sample` draws, without the logits leaving it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from prill_runtime.device.machine.base import Pointer
from prill_runtime.device.memory.array import DeviceArray, DeviceMemory
from prill_runtime.device.memory.slot import SEQUENCE_DTYPE, Slot
from prill_runtime.errors import EngineError, InvalidParameter, NotANumber
from prill_runtime.sampling.sampler import SamplingParams

# As in sample.cu.
SAMPLING_DTYPE: Final = np.dtype(
    [("temperature", "<f8"), ("top_p", "<f8"), ("min_p", "<f8"), ("penalty", "<f8"), ("seed", "<u8"),
     ("top_k", "<i4"), ("masks", "<i4")]
)  # fmt: skip
NOT_FINITE, ALL_MASKED, UNDECIDED, REFUSED = -1, -2, -3, -4
STATE_BYTES: Final = 256
BINS_BYTES: Final = 8 * 3 * 2048
LISTED_IDS: Final = 512
MOST_PARTS: Final = 128
IDS_PER_PART: Final = 2048  # of one thread block, as long as MOST_PARTS blocks are enough
FILTER_PASSES: Final = 8
"""Passes by many thread blocks in one graph: two for each filter and two for the draw, if nothing is flat."""


def sizes(vocab: int) -> dict[str, int]:
    """Bytes of the buffers that sampling needs, by name."""
    return {
        "params": SAMPLING_DTYPE.itemsize, "state": STATE_BYTES, "bins": BINS_BYTES, "values": 8 * LISTED_IDS,
        "which": 4 * LISTED_IDS, "partial": 64 * MOST_PARTS, "seen": vocab,
    }  # fmt: skip


class DeviceSampler:
    """The buffers and launches that draw one sequence's ids.

    Arithmetic is float64 as on the host, and masses are added up exactly. Given the same logits, an id can
    differ from `sampler.sample`'s only if the draw, or the mass that top-p keeps, lies closer to a border
    between two ids than the host's own sum is accurate (about 1e-12 of the whole; at most n 2^-53 for n
    ids), or if a weight lies within the last bit of min-p.

    Args:
        vocab: number of ids.
    """

    def __init__(self, ops: DeviceMemory, vocab: int) -> None:
        self.ops, self.vocab = ops, vocab
        self._buffers = {name: ops.allocate(size, "scratch") for name, size in sizes(vocab).items()}
        ops.device.fill(self._at("state"), STATE_BYTES)

    def _at(self, name: str) -> Pointer:
        return self._buffers[name].pointer

    def arm(self, params: SamplingParams, *, masks: bool = False) -> None:
        """Set how ids are chosen from now on.

        Args:
            masks: whether a logit of -inf masks its id; if not, a row that has one is refused.
        """
        # A temperature of 0 takes the lowest of the most probable ids.
        temperature, top_k = (params.temperature, params.top_k) if params.temperature else (1.0, 1)
        record = (temperature, params.top_p, params.min_p, params.repetition_penalty, params.seed,
                  min(top_k, self.vocab), int(masks))  # fmt: skip
        self.ops.device.upload(self._at("params"), np.array([record], SAMPLING_DTYPE))

    def remember(self, history: Sequence[int]) -> None:
        """Set the ids that the repetition penalty counts; ids chosen afterwards are added on the device.

        Raises:
            InvalidParameter: an id outside the vocabulary.
        """
        ids = np.asarray(history, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab:
            raise InvalidParameter(
                "id outside the vocabulary", where="history", expected=f"0 to {self.vocab - 1}",
                got=int(ids.min() if ids.min() < 0 else ids.max()),
            )  # fmt: skip
        seen = np.zeros(self.vocab, np.uint8)
        seen[ids] = 1
        self.ops.device.upload(self._at("seen"), seen)

    def launch(self, logits: DeviceArray, slot: Slot) -> None:
        """Queue the choice of an id from logits (1, vocab); it also moves the slot to the next position."""
        device, parts = self.ops.device, max(1, min(MOST_PARTS, -(-self.vocab // IDS_PER_PART)))
        args = {name: self._at(name) for name in self._buffers}
        args |= {"logits": logits.pointer, "vocab": self.vocab, **slot.targets}
        device.launch("sample_begin", (parts,), 256, args)
        for _ in range(FILTER_PASSES):
            device.launch("sample_pass", (parts,), 256, args)
        device.launch("sample_finish", (1,), 256, args)


def draw(
    ops: DeviceMemory, logits: Any, params: SamplingParams, position: int, history: Sequence[int]
) -> int:
    """The id that `sampler.sample` draws at `position` from logits (vocab,); the kernels, outside a graph.

    Args:
        position: 0 to 2^31 - 1.

    Raises:
        NotANumber, InvalidParameter: as `sampler.sample`.
    """
    row = ops.on(np.asarray(logits, np.float32)[None])
    sampler, slot = DeviceSampler(ops, row.shape[1]), Slot(ops.device, ops.arena)
    # As in a captured graph, the sequence ends before the id.
    before = np.zeros(1, SEQUENCE_DTYPE)
    before["length"] = position - 1
    slot.arm(before)
    sampler.arm(params, masks=True)
    sampler.remember(history)
    sampler.launch(row, slot)
    ((token,), _) = slot.read(0, 1)
    if token < 0:
        raise refusal(token)
    return token


def refusal(code: int) -> NotANumber | EngineError:
    """The error for a code that a kernel wrote in the place of an id."""
    if code == NOT_FINITE:
        return NotANumber("1 of 1 rows of logits are not finite", where="logits")
    if code == ALL_MASKED:
        return NotANumber("every logit is -inf", where="sampler", expected="one finite logit at least")
    if code == UNDECIDED:
        return EngineError("no id was reached", where="sampling on the device", expected="an id", got=code)
    token, is_nan = divmod(REFUSED - code, 2)
    return NotANumber(
        f"the logit of id {token} is {'nan' if is_nan else 'inf'}", where="sampler",
        expected="a finite number or -inf",
    )  # fmt: skip
