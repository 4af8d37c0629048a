"""Passes that an engine saved over ids of its own choice are held to the oracle's at every position."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prill_harness.engines.embedded import Embedded
from prill_harness.faults.opening import open_engine
from prill_harness.records.evidence import Status
from prill_harness.tokens.golden import Golden, golden_for
from prill_harness.tokens.judge import compare_teacher_forced
from prill_harness.tokens.steps import StepResult
from prill_runtime.errors import UsageError

MODEL = "fixture:llama-window"


@pytest.fixture(scope="module")
def oracle() -> Iterator[Embedded]:
    with open_engine("numpy64", MODEL) as engine:
        assert isinstance(engine, Embedded)
        yield engine


@pytest.fixture(scope="module")
def golden() -> Golden:
    return golden_for(MODEL)


def forced(path: Path, golden: Golden, oracle: Embedded, arithmetic: str = "float32") -> StepResult:
    with open_engine(f"recorded:{path},arithmetic={arithmetic}", MODEL) as engine:
        return compare_teacher_forced(engine, golden, oracle)


@pytest.mark.parametrize("own", [True, False], ids=["ids of its own", "ids of the golden"])
def test_saved_logits_of_numpy(own: bool, golden: Golden, oracle: Embedded, tmp_path: Path) -> None:
    """An .npz is held to the exact lane at every position, over any ids; one wrong row is found there."""
    texts = (
        [golden.prompts[1].ids[3:], golden.prompts[0].ids] if own else [p.sequence for p in golden.prompts]
    )
    with open_engine("numpy", MODEL) as engine:
        rows = [np.array(engine.logits(ids)) for ids in texts]
    arrays = {
        f"{key}_{n}": each
        for key, listed in (("ids", texts), ("logits", rows))
        for n, each in enumerate(listed)
    }
    np.savez(tmp_path / "sound.npz", model=oracle.info.model_sha256, **arrays)  # type: ignore[arg-type]
    found = forced(tmp_path / "sound.npz", golden, oracle)
    assert (found.step, found.status) == ("logits", Status.PASSED), found.sentence
    positions = sum(map(len, texts))
    assert found.observed == positions * oracle.model.vocab_size
    arrays["logits_1"][5] = arrays["logits_1"][6]
    np.savez(tmp_path / "wrong.npz", **arrays)  # type: ignore[arg-type]
    found = forced(tmp_path / "wrong.npz", golden, oracle)
    assert found.status is Status.FAILED
    assert ("worst at pass 1, position 5" if own else "worst at prompt 1, position 6") in found.sentence
    np.savez(tmp_path / "foreign.npz", model="ab" * 32, **arrays)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="of another model"):
        forced(tmp_path / "foreign.npz", golden, oracle)


def saved(path: Path, texts: list[list[int]], rows: list[np.ndarray[Any, Any]], vocabulary: int) -> Path:
    """A file of saved logits as llama.cpp's tool writes it: the rows of each chunk's second half."""
    context = len(texts[0])
    with path.open("wb") as file:
        file.write(b"_logits_" + struct.pack("<3i", context, vocabulary, len(texts)))
        for ids in texts:
            file.write(struct.pack(f"<{context}i", *ids))
        for logits in rows:
            for row in logits[context // 2 : context - 1]:
                least = max(float(row.min()), float(row.max()) - 16)
                scale = (float(row.max()) - least) / 65535
                total = float(row.max()) + float(np.log(np.exp(row - row.max()).sum()))
                steps = np.rint((np.maximum(row, least) - least) / scale).astype(int).tolist()
                steps += [0] * (vocabulary % 2)
                file.write(struct.pack("<2f", scale, least - total))
                file.write(struct.pack(f"<{len(steps)}H", *steps))
    return path


def test_llama_cpps_saved_logits(golden: Golden, oracle: Embedded, tmp_path: Path) -> None:
    """Its file of a sound engine passes in the exact lane; another eps, a row of another position, and ids
    that were computed without BOS do not."""
    size = oracle.model.vocab_size
    bos = oracle.model.tokenizer.bos_id
    # The tool writes the text's own ids, and computes with BOS at the beginning of each chunk.
    texts = [prompt.sequence[1:25] for prompt in golden.prompts[:2]]

    def logits(spec: str, begin: bool = True) -> list[np.ndarray[Any, Any]]:
        with open_engine(spec, MODEL) as engine:
            asked = [[bos, *ids[1:]] if begin else ids for ids in texts]
            return [np.array(engine.logits([token for token in ids if token is not None])) for ids in asked]

    rows = logits("numpy")
    found = forced(saved(tmp_path / "sound", texts, rows, size), golden, oracle)
    assert found.status is Status.PASSED, found.sentence
    assert found.detail["positions"] == 2 * 11
    wrong = [each.copy() for each in rows]
    wrong[1][20] = wrong[1][21]
    found = forced(saved(tmp_path / "row", texts, wrong, size), golden, oracle)
    assert found.status is Status.FAILED
    assert "worst at pass 1, position 20" in found.sentence
    for name, other in {
        "eps": logits("numpy+fault:rms_eps_too_small"),
        "bos": logits("numpy", False),
    }.items():
        found = forced(saved(tmp_path / name, texts, other, size), golden, oracle)
        assert found.status is Status.FAILED, name
    text = (tmp_path / "sound").read_bytes()
    for broken in (text[:-1], text[:12], text[:8], text[:8] + b"\xff" * 12 + text[20:]):
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(UsageError, match="not a whole file of saved logits"):
            forced(tmp_path / "broken", golden, oracle)
    (tmp_path / "vocabulary").write_bytes(
        saved(tmp_path / "other", texts, [r[:, :-2] for r in rows], size - 2).read_bytes()
    )
    with pytest.raises(UsageError, match="another vocabulary"):
        forced(tmp_path / "vocabulary", golden, oracle)
