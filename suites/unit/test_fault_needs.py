"""A fault says which features it needs, and is planted on the first packaged model that has them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from prill_fixtures import NAMES
from prill_harness.engines.features import PACKAGED, Traits, having, packaged, traits
from prill_harness.faults.catalogue import catalogue
from prill_harness.plan.provenance import model_facts
from prill_harness.planting import faults
from prill_harness.planting.faults import Fault, Patch
from prill_runtime.errors import UsageError
from prill_runtime.models.walks import FEATURES

ALL = catalogue() | catalogue("emu")
GPT2, LLAMA, WINDOW = "fixture:gpt2-tiny", "fixture:llama-tiny", "fixture:llama-window"
OSS, GEMMA = "fixture:gpt-oss-tiny", "fixture:gemma3-tiny"


def nothing() -> Iterator[Patch]:
    """Nothing."""
    yield from ()


def fault(**more: tuple[str, ...]) -> Fault:
    return Fault("bug", "rope", ("q_rope",), "is wrong", (), nothing, **more)


@pytest.mark.parametrize(("needs", "lacks", "model"), [
    (("rope",), (), LLAMA), (("learned_positions",), (), GPT2), (("window",), (), WINDOW),
    (("bias",), (), GPT2), (("bias",), ("fused_qkv",), WINDOW), (("bias", "rope"), (), WINDOW),
    ((), ("tied",), LLAMA), (("layer_norm", "tied"), ("gate",), GPT2),
    (("sinks", "experts", "yarn"), (), OSS), (("softcap", "window", "qk_norm", "bias"), (), GEMMA),
])  # fmt: skip
def test_the_first_model_with_the_features_is_taken(
    needs: tuple[str, ...], lacks: tuple[str, ...], model: str
) -> None:
    """All that it needs and nothing that it lacks; of several the first in the stated order, and it alone."""
    assert fault(needs=needs, lacks=lacks).models == (model,)
    assert traits(model).suits(needs, lacks)


def test_without_needs_it_shows_on_an_architecture_each() -> None:
    """The first model of each; and where models are given, on those."""
    assert fault().models == (LLAMA, GPT2, OSS, GEMMA)
    assert Fault("bug", "rope", ("q",), "", ("a.gguf",), nothing, needs=("rope",)).models == ("a.gguf",)


def test_needs_that_no_model_has_are_an_error_that_names_them() -> None:
    """A feature nobody has, or two that no one model has: which, and of which fault."""
    with pytest.raises(
        UsageError, match="show fault bug: expected one with parallel; give it a model of its own"
    ):
        _ = fault(needs=("parallel",)).models
    with pytest.raises(UsageError, match="expected one with rope and without gate"):
        _ = fault(needs=("rope",), lacks=("gate",)).models


def test_every_fault_has_a_model_that_suits_it() -> None:
    """Features are spelt as nodes spell them, and models that were given have them, too."""
    for declared in ALL.values():
        assert FEATURES.issuperset((*declared.needs, *declared.lacks)), declared.name
        assert declared.models
        assert traits(declared.models[0]).suits(declared.needs, declared.lacks), declared.name
    assert sum(bool(declared.needs or declared.lacks) for declared in ALL.values()) > 50


def test_the_order_holds_every_packaged_model() -> None:
    """None is forgotten, and none of them says less than its description."""
    assert {spec.removeprefix("fixture:") for spec in PACKAGED} == set(NAMES)
    assert all(found.features for found in packaged().values())
    assert {feature for found in packaged().values() for feature in found.features or ()} <= FEATURES
    assert having(("rope", "learned_positions")) is None


def test_a_fault_applies_to_what_is_known_to_have_its_features() -> None:
    """Not to a model without them, and not to one of which nobody knows."""
    turned = fault(needs=("rope",), lacks=("window",))
    assert turned.applies_to(Traits("x", frozenset({"rope", "gate"})))
    assert not turned.applies_to(Traits("x", frozenset({"rope", "window"})))
    assert not turned.applies_to(Traits("x", frozenset()))
    assert not turned.applies_to(Traits("x"))
    assert fault().applies_to(Traits("x"))


def blind() -> Iterator[Patch]:
    """Nothing has a feature."""
    yield Patch("prill_runtime.models.walks:features", lambda original: lambda network: frozenset())


def test_features_do_not_depend_on_what_is_planted() -> None:
    """Asked first while a fault hides all features, a fault's models and what a cell records are what they
    were."""
    packaged.cache_clear()
    model_facts.cache_clear()
    with faults.only((Fault("blind", "file", ("file",), "is wrong", (), blind),)):
        assert traits(GPT2).features == frozenset()
        assert fault(needs=("tied",)).models == (GPT2,)
        recorded = Traits.of_record(model_facts(GPT2))
    assert recorded == traits(GPT2)
    assert "tied" in (recorded.features or ())
