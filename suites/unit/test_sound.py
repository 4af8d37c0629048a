"""The generator of sound models: what it promises is in the files it writes."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings

from prill_fixtures import sound, sound_blocks
from prill_harness import open_engine
from prill_runtime.gguf.file import open_gguf
from prill_runtime.quants.layouts import dequantize, supported_types

from .sound_models import recipes


@settings(max_examples=25, deadline=None)
@given(recipe=recipes())
def test_every_recipe_loads_and_gives_finite_logits(recipe: sound.Recipe) -> None:
    """The strict reader takes every model drawn, and its logits are finite: it is sound."""
    with tempfile.TemporaryDirectory() as folder:
        file = sound.build(recipe, Path(folder) / "model.gguf")
        with open_engine("numpy", str(file)) as engine:
            logits = engine.logits([0] * min(4, recipe.context))
        assert logits.shape == (min(4, recipe.context), recipe.vocabulary.size)
        assert np.isfinite(logits).all()


def test_draws_cover_what_they_promise() -> None:
    """300 seeds give every block type, norm, head, weight kind and both ends of every size."""
    drawn = [sound.draw(seed) for seed in range(300)]
    assert {r.type for r in drawn} == {type.name for type in sound_blocks.TYPES}
    for name, choices in (("norms", sound.NORMS), ("head", sound.HEADS), ("weights", sound.WEIGHTS)):
        assert {getattr(r, name) for r in drawn} == set(choices)
    assert {r.family for r in drawn} == set(sound.FAMILIES)
    assert min(r.context for r in drawn) == 8
    assert max(r.context for r in drawn) > 512
    assert min(r.vocabulary.size for r in drawn) <= 2
    assert max(r.vocabulary.size for r in drawn) > 20_000
    assert any(r.head_dim * r.heads != r.width for r in drawn)
    assert any(r.width % 2 for r in drawn)
    for choice in ("tied", "biases", "pruned", "zero_blocks", "window", "rope_factor"):
        assert 2 <= Counter(bool(getattr(r, choice)) for r in drawn)[True] < 299, choice


def test_types_are_all_that_the_reader_takes() -> None:
    """A block type that the runtime learns to read has to be written here too."""
    assert set(sound_blocks.TYPES) == set(supported_types())


@pytest.mark.parametrize("type", sound_blocks.TYPES, ids=lambda type: type.name)
def test_blocks_have_the_deviation_asked_for(type: gguf.GGMLQuantizationType) -> None:
    """In every type: weights of mean 0 and the deviation asked for, constants constant, zeros zero."""
    blocks = sound_blocks.matrix(np.random.default_rng(1), 64, 256, type, 0.25)
    values = dequantize(blocks.reshape(-1), type, (64, 256))
    assert abs(values.mean()) < 0.02
    power = 1.5 if type == gguf.GGMLQuantizationType.MXFP4 else 1.1  # its scales are powers of two
    assert 0.25 / power < values.std() < 0.25 * power
    same = sound_blocks.constant(4, 256, type, 0.25)
    constant = dequantize(same.reshape(-1), type, (4, 256))
    assert len(np.unique(constant)) == 1
    assert constant[0, 0] != 0
    assert not dequantize(np.zeros_like(same).reshape(-1), type, (4, 256)).any()
    sound_blocks.rescale(blocks, type, np.zeros(blocks.shape[:2]))
    cleared = dequantize(blocks.reshape(-1), type, (64, 256))
    assert bool(cleared.any()) == (type in sound_blocks.PLAIN)  # plain types have no scale to clear


def test_a_recipe_is_repeated(tmp_path: Path) -> None:
    """The same recipe gives the same bytes, another seed others, and the head's ties are in the file."""
    recipe = replace(sound.draw(3, small=True), head="equal", tied=False, type="F32", weights="random")
    one, two = (sound.build(recipe, tmp_path / name).read_bytes() for name in ("one", "two"))
    other = sound.build(replace(recipe, seed=recipe.seed + 1), tmp_path / "other").read_bytes()
    assert one == two != other
    with open_gguf(tmp_path / "one") as file:
        rows = file.raw("output.weight").view(np.float32).reshape(recipe.vocabulary.size, recipe.width)
        used = rows[: recipe.vocabulary.size - recipe.vocabulary.unused]
        assert recipe.vocabulary.size > 1
        assert (used == used[0]).all()
