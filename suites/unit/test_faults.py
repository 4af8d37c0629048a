"""Planted faults: whom they touch, and that nothing of them stays."""

from __future__ import annotations

import gc
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import prill_runtime
from prill_harness.faults.catalogue import catalogue, named
from prill_harness.faults.opening import open_engine
from prill_harness.faults.trial.blame import AFTER_STAGES, BEFORE_STAGES, COST
from prill_harness.planting import faults
from prill_harness.planting.faults import Fault
from prill_harness.stages.table import KINDS as INNER
from prill_harness.stages.table import OUTER
from prill_runtime.errors import UsageError
from prill_runtime.ops.numpy import NumpyBackend

MODEL = "fixture:llama-tiny"
IDS = [1, 5, 9, 300, 17, 5]
PARTS = {part for part, _ in (*BEFORE_STAGES, *AFTER_STAGES, *COST)} | {"file", "harness", "trace", "oracle"}
KINDS = {*INNER, *OUTER}


def attributes(planted: Fault) -> list[tuple[Any, str, Any]]:
    """What lies, unpatched, at every place the fault patches: owner, name, value."""
    found = []
    for patch in planted.patches():
        owner, name = patch.owner()
        found.append((owner, name, inspect.getattr_static(owner, name)))
    return found


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    with open_engine("numpy", MODEL) as engine:
        return engine.logits(IDS)


@pytest.mark.parametrize("planted", catalogue().values(), ids=lambda fault: fault.name)
def test_a_fault_is_whole_and_leaves_nothing_behind(planted: Fault) -> None:
    """It says what is wrong in a clause and whom to blame, changes what it patches, and puts it back."""
    assert planted.summary
    assert "\n" not in planted.summary
    assert set(planted.blames) <= PARTS | KINDS, planted.blames
    before = attributes(planted)
    assert before, "no patch"
    with faults.only((planted,)):
        assert faults.active() == (planted,)
        for owner, name, original in before:
            assert inspect.getattr_static(owner, name) is not original
    for owner, name, original in before:
        assert inspect.getattr_static(owner, name) is original


def test_a_faulty_engine_disturbs_nobody(clean: np.ndarray) -> None:
    """Beside an engine with a fault, in whatever order they are asked, a sound one keeps its bits."""
    with open_engine("numpy+fault:rope_wrong_way", MODEL) as faulty, open_engine("numpy", MODEL) as sound:
        wrong = faulty.logits(IDS)
        assert np.array_equal(sound.logits(IDS), clean)
        assert np.array_equal(faulty.logits(IDS), wrong)
        assert np.array_equal(sound.logits(IDS), clean)
    assert not np.allclose(wrong, clean)


def test_a_session_of_a_faulty_engine_is_faulty() -> None:
    """What an engine hands out works under its faults too."""
    with open_engine("numpy+fault:rope_wrong_way", MODEL) as engine:
        session = engine.session()
        assert np.allclose(session.feed(IDS), engine.logits(IDS), atol=1e-3)


def test_faults_compose(clean: np.ndarray) -> None:
    """Two faults of different ops together: a third result, in either order the same."""

    def logits(spec: str) -> np.ndarray:
        with open_engine(f"numpy{spec}", MODEL) as engine:
            return engine.logits(IDS)

    first, second = "+fault:embed_scaled", "+fault:gate_up_swapped"
    both = logits(first + second)
    assert np.array_equal(both, logits(second + first))
    for other in (clean, logits(first), logits(second)):
        assert not np.allclose(both, other)


def test_two_faults_of_one_op_are_both_active() -> None:
    """The later patch wraps the earlier one; taken away together, nothing of either is left."""
    original = NumpyBackend.rope
    x, positions = np.ones((2, 1, 4), np.float32), np.array([0, 3])
    options: dict[str, Any] = {"base": 100.0, "dim": 4, "layout": "norm"}
    with faults.only(named(("rope_positions_from_one", "rope_wrong_way"))):
        both = NumpyBackend().rope(x, positions, **options)
    assert NumpyBackend.rope is original
    # -p, and one more.
    assert np.array_equal(both, NumpyBackend().rope(x, -positions + 1, **options))


def test_an_ambient_fault_spares_sound_engines(clean: np.ndarray) -> None:
    """Code without an engine is faulty in such a process, an engine opened without a fault is not."""
    (planted,) = named(["rope_ignored"])
    x = np.ones((2, 1, 4), np.float32)
    options: dict[str, Any] = {"base": 100.0, "dim": 4, "layout": "norm"}
    faults.ambient((planted,))
    try:
        assert np.array_equal(NumpyBackend().rope(x, np.array([0, 3]), **options), x)
        with open_engine("numpy", MODEL) as sound:
            assert np.array_equal(sound.logits(IDS), clean)
        assert faults.active() == (planted,)
    finally:
        faults.ambient(())
    assert not np.array_equal(NumpyBackend().rope(x, np.array([0, 3]), **options), x)


def test_faults_are_gone_after_an_error() -> None:
    """A call that fails half way takes its fault away with it."""
    original = NumpyBackend.rope
    with open_engine("numpy+fault:rope_wrong_way", MODEL) as engine, pytest.raises(UsageError):
        engine.logits([10**6])
    gc.collect()
    assert NumpyBackend.rope is original
    assert faults.active() == ()


def test_production_code_knows_no_faults() -> None:
    """The runtime has no branch for a fault: the word does not occur in it."""
    files = list(Path(prill_runtime.__file__).parent.rglob("*.py"))
    assert len(files) > 20
    words = ("planted", "prill_harness")
    assert not [file.name for file in files if any(word in file.read_text("utf-8") for word in words)]


def test_a_fault_declared_twice_or_half_is_refused() -> None:
    """A name again, an unknown area, nothing to blame, no summary: an error where it is declared."""

    def rope_ignored() -> Any:
        """Again."""
        return ()

    def nameless() -> Any:
        return ()

    def fresh() -> Any:
        """A clause."""
        return ()

    for function, area, blames in (
        (rope_ignored, "rope", ("q_rope",)),
        (nameless, "rope", ("q_rope",)),
        (fresh, "ropes", ("q_rope",)),
        (fresh, "rope", ()),
    ):
        with pytest.raises(ValueError, match="declared twice or incompletely"):
            faults.fault(area=area, blames=blames)(function)
