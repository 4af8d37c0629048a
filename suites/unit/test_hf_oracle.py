"""The oracle against transformers: random models written to GGUF give the same log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prill_runtime.run.model import Model

torch = pytest.importorskip("torch", reason="needs the extra hf")
pytest.importorskip("transformers", reason="needs the extra hf")

from .hf_models import LLAMAS, VOCAB, gpt2, llama, truly_float64  # noqa: E402

__all__ = ["truly_float64"]
pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("truly_float64")]

POSITIONS = 200
LIMITS = {"float64": 1e-9, "float32": 2e-4}


def compare(model: Any, path: Path, record: Callable[[str, object], None]) -> None:
    """Max |Δ logprob| over every position and id, per precision, within its limit."""
    ids = np.random.default_rng(7).integers(0, VOCAB, POSITIONS)
    with torch.no_grad():
        logits = model.double().eval()(torch.tensor(ids)[None], use_cache=False).logits[0]
        assert logits.dtype == torch.float64
        expected = torch.log_softmax(logits, dim=-1).numpy()
    assert expected.shape == (POSITIONS, VOCAB)
    # A flat distribution would agree with anything.
    assert (expected.max(axis=-1) > math.log(3 / VOCAB)).mean() > 0.9
    assert expected.std() > 0.5
    for dtype, limit in LIMITS.items():
        with Model.load(path, dtype=dtype) as candidate:  # type: ignore[arg-type]
            got = candidate.forward([(candidate.new_cache(), ids)])[0].astype(np.float64)
        got -= got.max(axis=-1, keepdims=True)
        got -= np.log(np.exp(got).sum(axis=-1, keepdims=True))
        worst = float(np.abs(got - expected).max())
        record(f"max_abs_dlogprob_{dtype}", worst)
        print(f"{path.stem} {dtype}: max |Δ logprob| {worst:.2e}, limit {limit:.0e}")
        assert got.shape == expected.shape
        assert worst < limit


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_agrees_with_transformers(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """LlamaForCausalLM over 200 positions: below 1e-9 in float64, below 2e-4 in float32."""
    compare(*llama(name, tmp_path), record_property)


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_gpt2_agrees_with_transformers(
    heads: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """GPT2LMHeadModel over 200 positions: below 1e-9 in float64, below 2e-4 in float32."""
    compare(*gpt2(heads, tmp_path), record_property)
