"""A gate is green on every sound model: suites that look at the model, on models that a seed draws.

Ten in CI. By hand, two hundred and more, of full size:

    PRILL_SOUND_MODELS=200 PRILL_SOUND_SIZE=full pytest suites/unit/test_sound_models.py -k random

A model that fails is named by its recipe; `sound.build(recipe, path)` writes it again.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from prill_fixtures import sound
from prill_fixtures.sound_vocab import SoundVocabulary
from prill_harness.plan.plan import Plan
from prill_harness.records.evidence import Cell, Evidence, Status
from prill_harness.records.ledger import read
from prill_harness.records.names import suite_of
from prill_harness.run import executor
from prill_harness.tokens.golden import golden_for
from prill_runtime.errors import PrillError
from prill_suites import harness

from .commandline import invoke

SUITES = ("tokens", "stages", "cache", "properties", "sampler", "errors", "cost", "witness")
OF_NO_MODEL = {"observe", "tmp_path", "pytestconfig"}  # what a check is handed that shows it no model
HARNESS = {
    test.pytestmark[0].kwargs["name"]: set(inspect.signature(test).parameters)
    for name, test in vars(harness).items()
    if name.startswith("test_")
}
MODELS = int(os.environ.get("PRILL_SOUND_MODELS", "10"))
SMALL = os.environ.get("PRILL_SOUND_SIZE", "small") == "small"
PLAIN = sound.Recipe(
    seed=1,
    family="llama",
    vocabulary=SoundVocabulary("spm", 300),
    context=64,
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    rope_dim=8,
    ffn=48,
)
GPT2 = replace(PLAIN, family="gpt2", vocabulary=SoundVocabulary("bpe", 300), kv_heads=4, biases=True)


def judged(out: Path, models: list[Path], what: Iterable[str], *engines: str) -> list[Evidence]:
    """The evidence that `prill run` leaves of these suites or checks.

    Goldens are recorded here: the command would start a process for each model.
    """
    for model in models:
        with suppress(PrillError):  # the cells say why, too
            golden_for(str(model))
    options = [word for model in models for word in ("--model", str(model))]
    options += [word for engine in engines or ("numpy",) for word in ("--engine", engine)]
    invoke("run", *options, "--jobs", "2", "--out", str(out), *what)
    return [record for record in read(out / "ledger.jsonl") if isinstance(record, Evidence)]


def red(evidence: list[Evidence]) -> list[str]:
    """What a gate on a sound model may not have."""
    return [
        f"{e.cell.model}: {e.check} {e.status}: {e.sentence}"
        for e in evidence
        if e.status is not Status.PASSED
    ]


def test_suites_are_green_on_random_sound_models(tmp_path: Path) -> None:
    """No check is failed, broken or inconclusive on any model that the generator draws; those of the harness
    that are shown no model, and say the same beside each, are asked beside the first."""
    alike = [name for name, handed in HARNESS.items() if handed <= OF_NO_MODEL]
    assert "harness.specimens" in alike
    assert "prill_model" not in inspect.getsource(harness)
    recipes = {f"{seed}.gguf": sound.draw(seed, small=SMALL) for seed in range(MODELS)}
    files = [sound.build(recipe, tmp_path / name) for name, recipe in recipes.items()]
    evidence = judged(tmp_path / "out", files, [*SUITES, *(HARNESS.keys() - alike)])
    assert len({e.cell.model for e in evidence}) == MODELS
    assert len(evidence) >= 40 * MODELS
    evidence += judged(tmp_path / "alike", files[:1], alike)
    assert {e.check for e in evidence} >= HARNESS.keys()
    found = red(evidence)
    told = [f"{name}: {recipe}" for name, recipe in recipes.items() if f"/{name}:" in str(found)]
    assert not found, "\n".join([*found, *told])


ENDS = {
    "a context of 8": replace(PLAIN, context=8),
    "one token": replace(PLAIN, vocabulary=SoundVocabulary("spm", 1, 0, False, False, False)),
    "one token, of no text": replace(
        PLAIN, context=12, vocabulary=SoundVocabulary("spm", 1, unused=1, unk=False, bos=False, eos=False)
    ),
    "norms of 0": replace(GPT2, norms="zero", biases=False, context=9),
    "constant weights": replace(GPT2, weights="constant", head="equal", context=24),
}


def test_suites_are_green_at_the_ends(tmp_path: Path) -> None:
    """The smallest context, a vocabulary without any text, and models that show next to nothing are green."""
    files = [sound.build(recipe, tmp_path / f"{name}.gguf") for name, recipe in ENDS.items()]
    evidence = judged(tmp_path / "out", files, ("tokens", "stages", "cache", "properties", "witness"))
    assert len(evidence) >= 31 * len(ENDS)
    assert not red(evidence)
    refused = [e.sentence for e in evidence if e.check == "tokens.prompt_ids" and "no text" in e.sentence]
    assert len(refused) == 1  # and what cannot be told is named in the record and in the sentence
    blind = [e for e in evidence if e.check == "properties.prefill_decode" and e.detail]
    assert len(blind) >= 2
    for record in blind:
        assert record.detail["not_applicable"] == ["the last tokens without their prompt"]
        assert "not to be told on this model" in record.sentence


def test_layers_that_add_less_than_rounding_takes_are_no_shared_buffer(tmp_path: Path) -> None:
    """Where all that is added to a stream is lost in it, and the logits are zeros, whose noise is none, the
    outputs of the first and last layer are equal; where the oracle's are apart, one buffer is wrong."""
    deep = replace(PLAIN, layers=4, context=16)
    quiet, loud = ({"weights": each, "norms": "zero at the output"} for each in ("tiny", "random"))
    files = [
        sound.build(replace(deep, **kind), tmp_path / f"{kind['weights']}.gguf") for kind in (quiet, loud)
    ]
    spoiled = "numpy+fault:trace_pointers_alias"
    evidence = judged(tmp_path / "out", files, ["stages.untouched"], "numpy", spoiled)
    found = {(Path(e.cell.model).stem, e.cell.engine): e.status for e in evidence}
    assert found == {
        ("tiny", "numpy"): Status.PASSED,
        ("random", "numpy"): Status.PASSED,
        ("tiny", spoiled): Status.FAILED,
        ("random", spoiled): Status.FAILED,
    }


ONCE_RED = {
    607: "witness.logits",  # a context of 14, shorter than the prompt
    618: "witness.logits",  # of 17, where positions are learned
    641: "stages.late",  # sums that cancel, over a last stretch of four positions
    645: "witness.floors",  # ids of the golden that are noisier than the first text's
    720: "properties.end_of_text",  # equal logits, of which the engine takes another than the oracle
    827: "stages.late",  # norms of equal values, equal rows of which err alike
    849: "properties.batch",  # a row of equal logits, whose noise one draw put at nothing
    1013: "cost.prompt",  # narrow heads and a prompt of a block and a bit: two blocks lived at once
}


def test_what_was_once_red_is_green(tmp_path: Path) -> None:
    """Each model on which a gate gave a false alarm, with the check that gave it, and the others of its suite
    that gave one."""
    files = {seed: sound.build(sound.draw(seed), tmp_path / f"{seed}.gguf") for seed in ONCE_RED}
    cells = tuple(Cell(str(files[seed]), "numpy", suite_of(name)) for seed, name in ONCE_RED.items())
    plan = Plan("run", cells, tuple(set(ONCE_RED.values())))
    evidence = [r for r in executor.run(plan, tmp_path / "out", 2) if isinstance(r, Evidence)]
    assert {(e.cell.model, e.check) for e in evidence} >= {(str(files[s]), n) for s, n in ONCE_RED.items()}
    assert not red(evidence)


@pytest.mark.parametrize("family", sound.FAMILIES)
def test_suites_are_green_in_every_short_context(tmp_path: Path, family: str) -> None:
    """From 8 positions to 24, where one prompt after another has to be cut."""
    recipe = replace(PLAIN if family == "llama" else GPT2, layers=1)
    contexts = range(8, 25, 4) if MODELS == 10 else range(8, 25)
    files = [sound.build(replace(recipe, context=n), tmp_path / f"{n}.gguf") for n in contexts]
    suites = tuple(name for name in SUITES if name != "harness")
    evidence = judged(tmp_path / "out", files, suites)
    assert len({e.cell.model for e in evidence}) == len(files)
    assert not red(evidence)


def test_late_positions_of_a_middling_context(tmp_path: Path) -> None:
    """A context of 64 to 299 has its later half compared, and the sentence says what was looked at."""
    file = sound.build(replace(PLAIN, context=128), tmp_path / "model.gguf")
    checks = ("tokens.late_positions", "stages.late", "cache.size", "properties.chunking")
    found = {e.check: e for e in judged(tmp_path / "out", [file], checks)}
    assert {name: e.status for name, e in found.items()} == dict.fromkeys(checks, Status.PASSED)
    assert "past 64, all that a context of 128 has" in found["tokens.late_positions"].sentence
    assert "positions 64-127" in found["stages.late"].sentence


FAULTS = {
    "mask_off_by_one": ("stages.early", "tokens.teacher_forced", "properties.chunking"),
    "cache_last_row_not_written": ("cache.exactly_full", "properties.prefill_decode"),
    "rope_ignored": ("properties.position_offset", "stages.early"),
    "seed_ignored": ("properties.same_seed",),
}


def test_a_short_model_still_kills(tmp_path: Path) -> None:
    """Shrunk to a context of 16, checks see the bugs that they see on a long model: none is excused."""
    file = sound.build(replace(PLAIN, context=16), tmp_path / "model.gguf")
    checks = sorted({check for checks in FAULTS.values() for check in checks})
    evidence = judged(tmp_path / "out", [file], checks, *(f"numpy+fault:{name}" for name in FAULTS))
    found = {(e.cell.engine.rpartition(":")[2], e.check): e.status for e in evidence}
    for fault, killers in FAULTS.items():
        assert {found[fault, check] for check in killers} == {Status.FAILED}, fault
