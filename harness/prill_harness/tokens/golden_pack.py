"""Goldens as strict JSON; large arrays are base64 of exact little-endian numbers."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Self

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from prill_harness.numbers.lanes import Figures
from prill_runtime.errors import UsageError
from prill_runtime.files import refuse_pipe
from prill_runtime.sampling.sampler import SamplingParams

SCHEMA = 1
NOISE_LADDER = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.2, 0.5, 1.0, 2.0)
ONLY_TOKEN_GAP = 1e9  # stands for the gap behind the only token of a vocabulary: no noise closes it
QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.1, 0.5, 0.9)

FOLLOWED = " followed"  # behind a lane's name: its floor on the experts that the oracle chose


class Packed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An array: exact float32, or ids in 16 or 32 bits."""

    dtype: Literal["<f4", "<u2", "<u4"]
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: ArrayLike) -> Self:
        a = np.asarray(array)
        dtype: Any = "<f4" if a.dtype.kind == "f" else "<u2" if a.size == 0 or a.max() < 1 << 16 else "<u4"
        return cls(dtype, a.shape, a.astype(dtype).tobytes())

    def __post_init__(self) -> None:
        size = int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize
        if len(self.data) != size:
            raise ValueError(f"packed array of shape {self.shape} needs {size} bytes, not {len(self.data)}")

    @property
    def array(self) -> NDArray[Any]:
        """The array, ids as int64."""
        a = np.frombuffer(self.data, self.dtype).reshape(self.shape)
        return a.astype(np.float32 if self.dtype == "<f4" else np.int64)


class SampledGolden(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tokens drawn with these parameters; end-of-text ids were drawn like any other."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    tokens: list[int]

    @property
    def params(self) -> SamplingParams:
        """The parameters with which the tokens were drawn."""
        return SamplingParams(**{field.name: getattr(self, field.name) for field in fields(SamplingParams)})


class GoldenPrompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One prompt and its greedy continuation.

    Attributes:
        tokens: greedy ids, not stopped by end-of-text, so that every bucket of positions is filled.
        first_eos: index of the first end-of-text id among them.
        top_ids, top_logprobs: (tokens, 20), best first; natural logprobs at each step.
        unspelled: the ids do not belong to the text, because no text has ids in this vocabulary.
    """

    text: str
    ids: list[int]
    tokens: list[int]
    first_eos: int | None
    top_ids: Packed
    top_logprobs: Packed
    sampled: list[SampledGolden]
    unspelled: bool = False

    @property
    def sequence(self) -> list[int]:
        """The ids to force: row len(ids)−1+i of their logits predicts tokens[i]."""
        return self.ids + self.tokens[:-1]

    @property
    def margins(self) -> NDArray[np.float64]:
        """Gap between the best two logits at each step (tokens,), exact to float32; see ONLY_TOKEN_GAP."""
        best = self.top_logprobs.array.astype(np.float64)
        if best.shape[1] < 2:
            return np.full(len(best), ONLY_TOKEN_GAP)
        return np.asarray(best[:, 0] - best[:, 1])


class Fingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a golden was recorded from."""

    model_sha256: str
    tokenizer_digest: str
    oracle: str
    versions: dict[str, str]


class Margins(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The distribution of the gap between the best two logits, over `positions` steps.

    Attributes:
        quantiles: gap by quantile. below: how many gaps are at most the key.
    """

    positions: int
    quantiles: dict[str, float]
    below: dict[str, int]

    @classmethod
    def of(cls, margins: NDArray[np.float64]) -> Self:
        return cls(
            positions=margins.size,
            quantiles={f"{q:g}": float(np.quantile(margins, q)) for q in QUANTILES},
            below={f"{tau:g}": int(np.count_nonzero(margins <= tau)) for tau in NOISE_LADDER},
        )


class Golden(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Expected tokens and logprobs of one model file, with the noise floor of each of its lanes."""

    schema: int
    name: str
    type: str
    fingerprint: Fingerprint
    config: dict[str, bool | int | float | str]
    prompts: list[GoldenPrompt]
    margins: Margins
    floors: dict[str, Figures]

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema}, this prill reads {SCHEMA}")
        for number, prompt in enumerate(self.prompts):
            rows = {len(prompt.tokens), prompt.top_ids.shape[0], prompt.top_logprobs.shape[0]}
            if not prompt.ids or not prompt.tokens or len(rows) != 1:
                raise ValueError(f"prompt {number} has arrays of different lengths, or none")
        if not self.prompts or "exact" not in self.floors:
            raise ValueError("a golden needs at least one prompt and the floor of the exact lane")

    def floor_of(self, lane: str) -> Figures:
        """A lane's floor on the experts that the oracle chose: what rounding moves, no choice exchanged.

        A model without experts has one floor, and so has a golden from before there were two.
        """
        return self.floors.get(lane + FOLLOWED, self.floors[lane])


def load(path: str | Path) -> Golden:
    """Read a golden file.

    Raises:
        UsageError: no such file, or not a golden of this schema; names the path inside it.
    """
    file = Path(path)
    try:
        refuse_pipe(file)
        return msgspec.json.decode(file.read_bytes(), type=Golden)
    except OSError as error:
        raise UsageError("cannot read the golden", where=str(file), got=error.strerror) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(
            "not a golden of this version", where=str(file), got=str(error), hint="record it again"
        ) from None


def save(golden: Golden, path: str | Path) -> None:
    """Write a golden file atomically."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        fresh.write_bytes(msgspec.json.encode(golden) + b"\n")
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)
