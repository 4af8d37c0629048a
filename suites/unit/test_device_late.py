"""Late positions on the emulator: kernels are right past their splits, and what is wrong there is seen."""

from __future__ import annotations

import numpy as np
import pytest

from prill_harness import open_engine
from prill_harness.engines.embedded import Embedded
from prill_harness.faults.catalogue import catalogue
from prill_harness.tokens.golden import golden_for
from prill_runtime.device.model import DeviceModel
from prill_runtime.errors import InvalidParameter, NotANumber
from prill_suites.sequences import longest_of

from .test_emu_engine import first_wrong, stages

MODEL = "fixture:llama-long"
PAST = 528  # ids, past four splits of keys and eight tiles of rows
LATE = sorted(name for name, fault in catalogue("emu").items() if fault.area == "late")
TENSOR = "device_late_tile_unmasked"  # in a kernel that only `fast` launches
DECODE = "device_late_decode_forgets"
IDS = longest_of(golden_for(MODEL))[:PAST]
SOUND = {"emu": 1e-11, "emu:fast": 5e-6}  # NMSE of the last rows, by arithmetic


def test_a_long_trace_is_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more rows than one step takes every stage is whole, and what is put in its place is used; one row
    too many is refused."""
    ids = IDS[:70]
    with open_engine("emu", MODEL) as engine:
        whole = stages(engine, ids)
        monkeypatch.setattr(DeviceModel, "most_rows", 32)
        assert first_wrong(stages(engine, ids), whole) is None
        flipped = whole["blk.1.out"][::-1]
        put = dict(engine.trace(ids, replace={"blk.1.out": flipped}))
        assert np.allclose(put["logits"], whole["logits"][::-1], atol=1e-4)
        with pytest.raises(InvalidParameter, match=r"blk\.1\.out"):
            engine.trace(ids, replace={"blk.1.out": np.concatenate([flipped, flipped[:1]])})


def last_rows(spec: str) -> float:
    """NMSE of the last 16 rows of logits of one pass over IDS."""
    with open_engine(spec, MODEL) as engine, open_engine("numpy64", MODEL) as oracle:
        got, expected = engine.logits(IDS)[-16:], oracle.logits(IDS)[-16:]
    return float(np.sum((got - expected) ** 2) / np.sum(expected**2))


def decoded(spec: str) -> float:
    """The largest error of the logprobs of four tokens that captured steps chose behind IDS."""
    with open_engine(spec, MODEL) as engine, open_engine("numpy64", MODEL) as oracle:
        assert isinstance(oracle, Embedded)
        done = engine.generate(IDS, max_tokens=4, ignore_eos=True)
        rows = oracle.logits([*IDS, *done.ids[:-1]])[-4:]
    expected = rows - np.log(np.sum(np.exp(rows), axis=-1, keepdims=True))
    return float(np.abs(expected[range(4), list(done.ids)] - done.logprobs).max())


@pytest.mark.parametrize("spec", sorted(SOUND))
def test_sound_kernels_are_right_late(spec: str) -> None:
    """Past four splits and eight tiles, in a prompt and behind it, the logits are the oracle's."""
    assert last_rows(spec) < SOUND[spec]
    if spec == "emu":  # captured steps are those of `fast` but for their products
        assert decoded(spec) < 1e-4


@pytest.mark.parametrize("fault", LATE)
def test_late_faults_of_a_device_are_killed(fault: str) -> None:
    """Each is invisible on 160 ids, and past 512 it moves the stage that it is blamed for."""
    blames = catalogue("emu")[fault].blames
    assert catalogue("emu")[fault].models == (MODEL,)
    if fault == TENSOR:
        assert last_rows(f"emu:fast+fault:{fault}") > 10 * SOUND["emu:fast"]
    elif fault == DECODE:
        assert decoded(f"emu+fault:{fault}") > 1e-3
    else:
        with open_engine(f"emu+fault:{fault}", MODEL) as broken, open_engine("numpy64", MODEL) as oracle:
            assert first_wrong(stages(broken, IDS[:160]), stages(oracle, IDS[:160])) is None
            try:
                found = first_wrong(stages(broken, IDS), stages(oracle, IDS))
            except NotANumber as error:  # keys that were never written
                found = error.where.rpartition(".")[2]
        assert found in blames
