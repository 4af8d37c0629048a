"""Is the oracle right about this very file? A second reading, which shares no code with it, is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from prill_harness.engines.embedded import Embedded
from prill_harness.numbers import lanes
from prill_harness.numbers.compare import nmse, nmse_of, smallest, squares
from prill_harness.numbers.sequential import SequentialBackend
from prill_harness.planting import faults
from prill_harness.run.checks import Observer, check
from prill_harness.stages import routing
from prill_harness.tokens.golden import Golden
from prill_harness.tokens.golden_pack import FOLLOWED
from prill_harness.witness import naive as witness
from prill_harness.witness import second, sensitivity
from prill_harness.witness.reading import Reading
from prill_runtime.errors import Inconclusive, PrillError
from prill_runtime.ops.numpy import NumpyBackend
from prill_runtime.ops.rounded import RoundedBackend
from prill_runtime.run.model import Model
from prill_suites.sequences import context_of, texts_of
from prill_suites.witness_second import SHARED, bound, confirmed

SECOND = "the witness: a naive float64 forward pass that shares no code with the oracle"
PROMPT = 24  # ids that the whole model is compared on
SHORT = 10  # ids that a changed file is compared on
NOISY = 48  # ids that the noise of a lane is measured on again
ROUNDED = "a float64 pass, rounded as the lane rounds"
# NMSE between two float64 passes that sum in another order: a rounding is worth 2^-108, a pass some thousand.
SUMMED = 2.0**-88
ROUNDINGS = 100.0  # times the witness's own, as in the exact lane
MOVED = 1e-12  # NMSE by which a change has to move the witness for the oracle to be judged by it


@pytest.fixture(scope="module")
def reading(model_path: Path) -> Reading:
    """The file as the witness reads it.

    Raises:
        Inconclusive: an architecture that the witness does not know.
    """
    with faults.only(()):
        found = witness.read(model_path)
    if not witness.knows(found) and not (second.asked() and second.knows(found)):
        raise Inconclusive(
            "the oracle shares its code with this engine, and no witness knows the architecture",
            expected=" or ".join(witness.FORWARD),
            got=found.architecture,
            hint=f"a naive forward pass under the entry point group {witness.GROUP} is asked",
        )
    return found


def second_of(reading: Reading) -> str:
    """Who the oracle is compared with."""
    theirs = witness.whose(reading)
    return f"the witness {theirs}: a forward pass of its own" if theirs else SECOND


def varied(golden: Golden, count: int) -> list[int]:
    """The first ids of a golden's text and its continuation, as many as the context holds: of the text that
    begins most variously."""
    room = context_of(golden)
    return max((text[:count][:room] for text in texts_of(golden)), key=lambda ids: len(set(ids)))


def limit(error: float, reading: Reading, ids: Sequence[int], expected: NDArray[np.float64]) -> float:
    """The NMSE that two float64 readings may be apart on these ids.

    Where an error is beyond what sums in another order explain, the witness is asked how far other roundings
    move it: on a model whose logits are small sums of large terms, or the norm of equal values, that is more.
    """
    if error <= SUMMED:
        return SUMMED
    own = nmse(expected, witness.logits(reading.rounded(), ids))
    return max(SUMMED, ROUNDINGS * own)


def moved(before: NDArray[np.float64], after: NDArray[np.float64]) -> bool:
    """Whether a change shows in the logits at all."""
    return nmse(before, after) > MOVED


def only_rounding(observe: Observer, error: float, most: float) -> None:
    """Say of a model whose logits are rounding alone that no reading can be told from another on it."""
    observe.note(not_applicable=["the logits of this model"])
    observe.say(
        "not to be told on this model: other roundings move the witness's own logits by NMSE "
        f"{most / ROUNDINGS:.2g}; the oracle is {error:.2g} from it"
    )


@check(
    "witness.logits",
    kills=(
        "common_rope_pairing",
        "common_attention_scale_1_over_d",
        "common_residual_of_norm",
        "common_rms_eps_too_small",
    ),
)
def test_logits(
    observe: Observer, oracle: Embedded, golden: Golden, reading: Reading, model_path: Path
) -> None:
    """The oracle's logits are the witness's; with another eps the witness's own are told apart from them."""
    ids = varied(golden, PROMPT)
    told = confirmed(observe, oracle, golden, reading, ids, model_path) if second.asked() else ""
    if not witness.knows(reading):
        observe.say(f"{len(ids)} positions of the oracle: {told}; the witness does not know the architecture")
        return
    expected, got, who = witness.logits(reading, ids), oracle.logits(ids), second_of(reading)
    observe.saw(expected.size, oracle=who)
    error = nmse(expected, got)
    most = limit(error, reading, ids, expected)
    if most >= MOVED:
        only_rounding(observe, error, most)
        return
    if told and error > bound(golden):
        # Of two that contradict each other, the one that nobody here wrote.
        observe.say(f"{len(ids)} positions of the oracle: {told}; the witness is outvoted, NMSE {error:.2g}")
        return
    observe.metric(
        "oracle against witness NMSE",
        error,
        at_most=most,
        otherwise=f"the oracle is wrong on this file: NMSE {error:.3g} to {who}, at most {most:.2g}; "
        f"{SHARED} is to blame",
    )
    control = next(iter(sensitivity.variations(reading, len(ids))))
    other = witness.logits(control.reading, ids)
    if expected.any() and moved(expected, other):
        observe.metric("control: another eps, NMSE", nmse(expected, other), at_least=SUMMED)
    also = f"; {told}" if told else ""
    observe.say(
        f"{len(ids)} positions, {expected.size} logits of the oracle: NMSE {error:.2g} to {who}{also}"
    )


@check(
    "witness.sensitivity",
    kills=("common_window_ignored", "common_rope_freqs_ignored", "common_rope_factor_ignored"),
)
def test_sensitivity(observe: Observer, golden: Golden, reading: Reading, model_path: Path) -> None:
    """Whatever the file says otherwise moves the oracle as it moves the witness: it was read."""
    if not witness.knows(reading):
        raise Inconclusive("no witness knows the architecture, and transformers is not asked about changes")
    ids = varied(golden, SHORT)
    shallow = sensitivity.shallow(reading)
    before, who = witness.logits(shallow, ids), second_of(reading)
    base = sensitivity.oracle_logits(model_path, shallow, ids)
    observe.saw(before.size, oracle=who)
    apart = nmse(before, base)
    most = limit(apart, shallow, ids, before)
    if most >= MOVED:
        only_rounding(observe, apart, most)
        return
    observe.metric(
        "first layers as the file has them, NMSE",
        apart,
        at_most=most,
        otherwise=f"the oracle is wrong on this file: its first layers are at NMSE {apart:.3g} from {who}",
    )
    seen, still = [], []
    for variation in sensitivity.variations(shallow, len(ids)):
        expected = witness.logits(variation.reading, ids)
        if not moved(before, expected):
            still.append(variation.name)
            continue
        try:
            got = sensitivity.oracle_logits(model_path, variation.reading, ids)
        except PrillError as refusal:
            observe.fail(f"the oracle refuses the file with another {variation.name}: {refusal}")
        observe.saw(expected.size, oracle=who)
        observe.expect(
            moved(base, got),
            f"{variation.name} is not read: changing it moves the witness (NMSE "
            f"{nmse(before, expected):.3g}) and leaves the oracle where it was",
        )
        error = nmse(expected, got)
        most = limit(error, variation.reading, ids, expected)
        if most >= MOVED:
            still.append(f"{variation.name} (rounding alone, NMSE {most / ROUNDINGS:.2g})")
            continue
        observe.metric(
            f"{variation.name} NMSE",
            error,
            at_most=most,
            otherwise=f"with another {variation.name} the oracle is at NMSE {error:.3g} from the witness, "
            f"at most {most:.2g}",
        )
        seen.append(variation.name)
    quiet = f"; nothing shows on this model for {', '.join(still)}" if still else ""
    observe.say(f"{len(seen)} changes move oracle and witness alike: {', '.join(seen)}{quiet}")


@check("witness.floors", kills=("floor_of_wrong_float32", "floor_of_wrong_rounding"))
def test_floors(observe: Observer, golden: Golden, model_path: Path) -> None:
    """The noise that each lane allows is what rounding leaves, and not what the runtime makes of it.

    The floors of a golden are measured by the runtime's own passes in lower precision, so a mistake in those
    would widen every bound. Here a float64 pass is rounded as the lane rounds.
    """
    ids = varied(golden, NOISY)
    with faults.only(()):
        for name, floor in golden.floors.items():
            own = noise_on(observe, golden, model_path, name, [ids])
            if floor.nmse > lanes.TYPE_RATIO * own:
                # Some ids of the golden may be noisier than these: on the very ones that the floor is of.
                own = noise_on(observe, golden, model_path, name, [p.sequence for p in golden.prompts])
            observe.expect(
                floor.nmse <= lanes.TYPE_RATIO * own,
                f"the noise floor of the lane {name} is NMSE {floor.nmse:.3g}, rounding leaves {own:.3g}: "
                "what measured it is wrong, and excuses engines that are as wrong",
            )
            observe.note(**{f"{name} floor over rounding": floor.nmse / own if own else 0.0})
    observe.say(f"the floors of {' and '.join(golden.floors)} are what rounding leaves on {len(ids)} ids")


def noise_on(
    observe: Observer, golden: Golden, path: Path, lane: str, texts: Sequence[Sequence[int]]
) -> float:
    """The NMSE that a lane's rounding leaves on all positions of the texts together."""
    sums = np.zeros(2)
    for ids in texts:
        truth = rows_of(path, NumpyBackend("float64"), ids, {})
        chosen = experts_of(path, ids) if lane.endswith(FOLLOWED) else {}
        sums += squares(truth, rows_of(path, rounded(golden.type, lane.removesuffix(FOLLOWED)), ids, chosen))
        observe.saw(truth.size, oracle=ROUNDED)
    return smallest(nmse_of(*sums.tolist()), lanes.AGAINST_ZEROS)


def rounded(type: str, lane: str) -> NumpyBackend:
    """A float64 pass with a lane's rounding."""
    if lane == lanes.EXACT.name:
        return SequentialBackend()
    return RoundedBackend("float64", lanes.type_lane(type).activations)  # type: ignore[arg-type]


def rows_of(
    path: Path, backend: NumpyBackend, ids: Sequence[int], chosen: Mapping[str, routing.Chosen]
) -> NDArray[np.float64]:
    """Logits (len(ids), vocabulary) of one pass, through these experts where there are any."""
    with Model.load(path, backend=backend) as model:
        return routing.through(model, ids, routing.fixed(chosen))["logits"]


def experts_of(path: Path, ids: Sequence[int]) -> dict[str, routing.Chosen]:
    """Those that a float64 pass chooses."""
    with Model.load(path, dtype="float64") as model:
        return routing.choices(model.network, routing.through(model, ids))
