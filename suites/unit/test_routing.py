"""Experts that rounding exchanges: no false alarm, no wider bound, and nothing excused beyond the noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from prill_harness.engines.base import Capability
from prill_harness.engines.embedded import Embedded, NumPy64
from prill_harness.faults.catalogue import catalogue, named
from prill_harness.numbers import lanes
from prill_harness.planting import faults
from prill_harness.records.evidence import Status
from prill_harness.run.checks import CheckFailed, Observer
from prill_harness.stages import routing
from prill_harness.stages import trace as traces
from prill_harness.tokens.golden import Golden, record
from prill_harness.tokens.judge import compare_teacher_forced
from prill_runtime.errors import Inconclusive
from prill_runtime.ops.rounded import RoundedBackend
from prill_runtime.run.model import Model
from prill_suites import harness_experts
from prill_suites.stages import compare_stages

from .families import write

IDS, FIRST = 48, "blk.0.routed"
Tensors = dict[str, NDArray[np.float32]]
# What a type of weights keeps apart, and its lane's rounding does not.
KINDS = [(arch, *each) for arch in ("gpt-oss", "qwen3moe") for each in ((T.F16, 5e-4), (T.Q8_0, 5e-3))]


def near_ties(apart: float) -> Any:
    """Routers whose fourth expert is the first but for a share `apart` of each number."""

    def edit(tensors: Tensors) -> None:
        random = np.random.default_rng(8)
        for name, array in tensors.items():
            if "ffn_gate_inp" in name:
                array[3] = array[0] * (1 + apart * random.standard_normal(array[0].shape))

    return edit


class Lane(Embedded):
    """An engine that rounds as a file's type lane does, and says so."""

    dtype = "float32"


@contextmanager
def rounding(path: Path, kind: str, fault: str = "") -> Iterator[Lane]:
    def opened() -> Lane:
        activations: Any = lanes.type_lane(kind).activations
        engine = Lane(Model.load(path, backend=RoundedBackend("float32", activations)), str(path))
        engine._info = replace(engine.info, arithmetic="half")
        return engine

    with faults.scoped(opened, named((fault,) if fault else ())) as engine:
        assert isinstance(engine, Lane)
        yield engine


class Case:
    """A random file, its golden and its oracle."""

    def __init__(self, path: Path) -> None:
        self.path, self.golden = path, record(path, tokens=24)
        self.oracle = NumPy64.open("", str(path))
        assert isinstance(self.oracle, NumPy64)
        self.ids = max((prompt.sequence for prompt in self.golden.prompts), key=len)[:IDS]

    def stages(self, engine: Embedded) -> str:
        """What the comparison of stages says."""
        observe = Observer()
        compare_stages(observe, engine, self.oracle, self.golden, self.path, self.ids, [range(len(self.ids))])
        return observe.sentence

    def routes(self, engine: Embedded) -> routing.Routes | None:
        lane = lanes.lane_for(self.golden.type, engine.info.arithmetic)
        return routing.followed(engine, self.oracle, lane, self.ids)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    arch, kind, apart = request.param
    made = Case(write(arch, tmp_path_factory.mktemp("routing") / "m.gguf", kind, edit=near_ties(apart)))
    yield made
    made.oracle.close()


TIED = pytest.mark.parametrize("case", KINDS, indirect=True, scope="module")
ONE = pytest.mark.parametrize("case", [("gpt-oss", T.F16, 5e-4)], indirect=True, scope="module")


@TIED
def test_rounding_raises_no_alarm_where_experts_are_nearly_tied(case: Case) -> None:
    """Stages and logits of an engine that rounds are within the bound, which has no exchange in it; how many
    positions were judged with its own choice is said, and that it was another one at some."""
    with rounding(case.path, case.golden.type) as engine:
        said, forced = case.stages(engine), compare_teacher_forced(engine, case.golden, case.oracle)
        routes = case.routes(engine)
    assert routes is not None
    count, others = int(routes.rows.sum()), int(routes.exchanged.sum())
    assert 0 < others <= count <= IDS
    clause = (
        f"{count} of {IDS} positions had a router margin below the noise and were judged with the engine's "
    )
    assert f"; {clause}own choice, at {others} of them other experts than the oracle's" in said
    assert forced.status is Status.PASSED, forced.sentence
    assert "were judged with the engine's own choice" in forced.sentence


@pytest.mark.parametrize("case", [("gpt-oss", T.F32, 3e-8), ("qwen3moe", T.F32, 3e-8)], indirect=True)
def test_float32_exchanges_experts_too(case: Case) -> None:
    """Rows a bit apart: in the exact lane the oracle follows an engine in float32, and finds nothing."""
    with Lane(Model.load(case.path), str(case.path)) as engine:
        said = case.stages(engine)
        assert compare_teacher_forced(engine, case.golden, case.oracle).ok
        routes = case.routes(engine)
    assert routes is not None
    assert routes.exchanged.any()
    assert "own choice" in said


@TIED
def test_a_floor_without_exchanges_is_no_wider(case: Case) -> None:
    """A golden has both, in every lane; what an exchange adds is in the one alone."""
    floors = case.golden.floors
    lane = lanes.type_lane(case.golden.type).name
    assert set(floors) == {"exact", "exact followed", lane, f"{lane} followed"}
    assert case.golden.floor_of(lane) == floors[f"{lane} followed"]
    assert floors[f"{lane} followed"].nmse < floors[lane].nmse / 4


EXPERT_FAULTS = [
    fault.name for fault in catalogue().values()
    if "experts" in fault.needs and fault.area == "options" and fault.name != "ties_to_highest_id"
]  # fmt: skip


@ONE
@pytest.mark.parametrize("fault", EXPERT_FAULTS)
def test_a_mistake_in_the_experts_is_found_through_rounding(case: Case, fault: str) -> None:
    """Following a choice excuses none of them, and the stage is the one that the fault is blamed on."""
    with rounding(case.path, case.golden.type, fault) as engine, pytest.raises(CheckFailed) as failed:
        case.stages(engine)
    stage = str(failed.value).partition(" is the first wrong stage")[0]
    assert stage.rpartition(".")[2] in catalogue()[fault].blames


def exchange(case: Case, at: int, *hidden: str) -> traces.Trace:
    """The oracle's trace with one expert exchanged, without the stages that are hidden."""
    stages = harness_experts.exchanged(case.oracle.model, case.ids, at)
    return traces.Trace(tuple(case.ids), {name: stages[name] for name in stages if name not in hidden})


def followed(case: Case, trace: traces.Trace) -> routing.Routes:
    """What the oracle makes of it."""
    lane, truth = lanes.type_lane(case.golden.type), traces.capture(case.oracle, case.ids).stages
    routes = routing.follow(case.oracle, lane, trace, truth)
    assert routes is not None
    return routes


class Ends:
    """The first router of a case: what noise explains, and of each position the margin and both experts."""

    def __init__(self, case: Case) -> None:
        truth = traces.capture(case.oracle, case.ids).stages
        node = routing.routers(case.oracle.model.network)[FIRST]
        self.noise = routing.noise_of(case.oracle, lanes.type_lane(case.golden.type), case.ids, truth)[FIRST]
        self.margins = routing.margins(truth[node.router.stage], node.used)
        order = np.argsort(-truth[node.router.stage], axis=1, kind="stable")
        self.left, self.taken = order[:, node.used - 1], order[:, node.used]


@ONE
def test_an_exchange_is_excused_up_to_the_noise_and_no_further(case: Case) -> None:
    """At every position: followed where the margin is within the noise, else named with layer, position, both
    experts and the margin, however near to the noise it is."""
    ends = Ends(case)
    assert 0 < (ends.margins <= ends.noise).sum() < IDS
    for at, (margin, left, taken) in enumerate(zip(ends.margins, ends.left, ends.taken, strict=True)):
        routes = followed(case, exchange(case, at, "blk.0.router"))
        if margin <= ends.noise:
            assert routes.exchanged[at]
            assert routes.rows[at]
            assert not routes.wrong
        else:
            assert not routes.chosen[FIRST][at, taken]
            assert routes.wrong[FIRST] == (
                f"position {at} has expert {taken} instead of {left}, which the oracle puts {margin:.3g} "
                f"above; the noise explains {ends.noise:.3g}"
            )


@ONE
def test_a_choice_against_its_own_logits_is_wrong_at_any_margin(case: Case) -> None:
    """An engine that shows the logits of its router is held to them, whatever noise would explain."""
    ends = Ends(case)
    at = int(ends.margins.argmin())
    assert ends.margins[at] < ends.noise
    refused = (
        f"position {at} has expert {ends.taken[at]} instead of {ends.left[at]}, which its own logits put "
    )
    assert followed(case, exchange(case, at)).wrong[FIRST].startswith(refused)


@ONE
def test_where_nothing_differs_nothing_is_computed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle's own choice, or none that is shown, costs no pass and changes no sentence."""
    monkeypatch.setattr(routing, "through", lambda *given: pytest.fail("a pass was made"))
    lane, truth = lanes.type_lane(case.golden.type), traces.capture(case.oracle, case.ids)
    assert routing.follow(case.oracle, lane, truth, truth.stages) is None
    blind = {name: array for name, array in truth.stages.items() if "route" not in name}
    assert routing.follow(case.oracle, lane, replace(truth, stages=blind), truth.stages) is None


@ONE
def test_an_expert_too_few_is_not_followed(case: Case) -> None:
    """A row with another number of experts keeps the oracle's: its stages are compared, not excused."""
    lane, truth = lanes.type_lane(case.golden.type), traces.capture(case.oracle, case.ids)
    stages = dict(truth.stages)
    stages[FIRST] = np.where(stages[FIRST] == stages[FIRST].max(axis=1, keepdims=True), 1.0, 0.0)
    assert routing.follow(case.oracle, lane, replace(truth, stages=stages), truth.stages) is None


@ONE
def test_an_exchange_moves_later_positions_and_no_earlier_one(case: Case) -> None:
    """Why the oracle follows a choice for the whole pass: it flows on through keys and values."""
    at, truth = 3, case.oracle.logits(case.ids)
    moved = np.abs(exchange(case, at).stages["logits"] - truth).max(axis=1)
    assert not moved[:at].any()
    assert moved[at] > 100 * moved[at + 1 :].min() > 0
    assert (moved[at + 1 :] > 0).all()


@pytest.mark.parametrize("case", [("qwen3moe", T.Q8_0, 1e-6)], indirect=True)
def test_routers_that_noise_always_decides_are_inconclusive(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No choice was judged then, in stages or logits: neither passes."""
    noise_of = routing.noise_of
    monkeypatch.setattr(routing, "noise_of", lambda *given: dict.fromkeys(noise_of(*given), 1e9))
    with rounding(case.path, case.golden.type) as engine:
        with pytest.raises(Inconclusive, match="no router chose by more than the noise: 48 of 48 positions"):
            case.stages(engine)
        forced = compare_teacher_forced(engine, case.golden, case.oracle)
    assert forced.status is Status.INCONCLUSIVE


def blind(engine: Lane) -> Lane:
    """The same engine, which shows no stages."""
    engine._info = replace(engine.info, capabilities=engine.info.capabilities - {Capability.TRACE})
    return engine


@ONE
def test_an_engine_without_stages_is_held_to_both_floors(case: Case) -> None:
    """As far as no choice is the noise's to the narrow one; the rest is counted, and a mistake is found."""
    with rounding(case.path, case.golden.type) as engine:
        forced = compare_teacher_forced(blind(engine), case.golden, case.oracle)
    assert forced.status is Status.PASSED, forced.sentence
    assert "the engine shows no choice: they were held to a floor with exchanged experts" in forced.sentence
    with rounding(case.path, case.golden.type, "router_bias_dropped") as engine:
        forced = compare_teacher_forced(blind(engine), case.golden, case.oracle)
    assert forced.status is Status.FAILED


def test_the_specimen_lies_on_either_side_of_the_noise() -> None:
    """Sound and wrong are neighbours in order of margin, so that a little too much noise is noticed."""
    sound, wrong = Observer(), Observer()
    harness_experts.judge(sound, False)
    with pytest.raises(
        CheckFailed, match=r"^blk\.0\.routed is the first wrong stage: position \d+ has expert"
    ):
        harness_experts.judge(wrong, True)
    assert "own choice" in sound.sentence


def test_a_golden_without_experts_has_one_floor_in_each_lane(tmp_path: Path) -> None:
    """Nothing is recorded twice for a dense model, and its floor is the one there is."""
    golden: Golden = record(write("qwen2", tmp_path / "m.gguf", T.F16), tokens=4)
    assert set(golden.floors) == {"exact", "f16"}
    assert golden.floor_of("f16") == golden.floors["f16"]
