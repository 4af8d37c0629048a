"""The oracle against transformers: a random model of each family gives the same log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from prill_runtime.run.model import Model

pytest.importorskip("torch", reason="needs the extra hf")
pytest.importorskip("transformers", reason="needs the extra hf")

from .hf_families import FAMILIES, VOCAB, expected_logprobs, family, float64_everywhere

__all__ = ["float64_everywhere"]
pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("float64_everywhere")]

POSITIONS = 200
LIMITS = {"float64": 1e-9, "float32": 2e-4}


def logprobs(path: Path, dtype: str, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    with Model.load(path, dtype=dtype) as model:  # type: ignore[arg-type]
        got = model.forward([(model.new_cache(), ids)])[0].astype(np.float64)
    got -= got.max(axis=-1, keepdims=True)
    return np.asarray(got - np.log(np.exp(got).sum(axis=-1, keepdims=True)))


@pytest.mark.parametrize("case", FAMILIES)
def test_a_family_agrees_with_transformers(
    case: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Over 200 positions and all ids: below 1e-9 in float64, below 2e-4 in float32."""
    model, path = family(case, tmp_path)
    ids = np.random.default_rng(7).integers(0, VOCAB, POSITIONS)
    expected = expected_logprobs(model, ids)
    # A flat distribution would agree with anything.
    assert expected.std() > 0.5
    for dtype, limit in LIMITS.items():
        worst = float(np.abs(logprobs(path, dtype, ids) - expected).max())
        record_property(f"max_abs_dlogprob_{dtype}", worst)
        print(f"{path.stem} {dtype}: max |Δ logprob| {worst:.2e}, limit {limit:.0e}")
        assert worst < limit


def test_short_phi3_prompts_have_the_short_divisors(tmp_path: Path) -> None:
    """Of 128 positions the published code takes one table, of 129 the other: both lengths agree with it."""
    model, path = family("phi3", tmp_path)
    for count in (128, 129):
        ids = np.random.default_rng(7).integers(0, VOCAB, count)
        assert np.abs(logprobs(path, "float64", ids) - expected_logprobs(model, ids)).max() < 1e-9
