"""Where does the first wrong number appear? The engine's trace against the oracle's, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from prill_harness.engines.base import Capability, Engine
from prill_harness.engines.embedded import Embedded
from prill_harness.numbers.compare import nmse
from prill_harness.numbers.lanes import Lane, bounds, lane_for
from prill_harness.run.checks import Observer, check
from prill_harness.stages import routing
from prill_harness.stages import trace as traces
from prill_harness.stages.findings import hidden
from prill_harness.stages.subject import stage_table
from prill_harness.stages.trace import Trace
from prill_harness.tokens.golden import Golden
from prill_runtime.errors import Inconclusive
from prill_suites.sequences import late_spans, longest_of
from prill_suites.stages_noise import Noise

EARLY = 64  # positions
Rows = NDArray[np.intp]


@pytest.fixture(scope="module")
def text(golden: Golden) -> list[int]:
    """A golden prompt and its continuation: the whole context of a small model, 300 positions of others."""
    return longest_of(golden)


def bound(engine: Engine, golden: Golden) -> tuple[Lane, float]:
    """The lane and its NMSE bound."""
    lane = lane_for(golden.type, engine.info.arithmetic)
    if lane.name not in golden.floors:
        raise Inconclusive(f"the golden has no noise floor for the lane {lane.name}")
    return lane, bounds(lane, golden.floor_of(lane.name)).nmse


def parted(spans: Sequence[range], first: int, routes: routing.Routes | None) -> list[tuple[range, Rows]]:
    """Each span with its rows from the first on; those whose router's margin is below the noise apart."""
    whole = [(span, np.arange(span.start - first, span.stop - first)) for span in spans]
    if routes is None:
        return whole
    apart = [
        (span, rows[routes.rows[first + rows] == which]) for span, rows in whole for which in (False, True)
    ]
    return [(span, rows) for span, rows in apart if rows.size]


def compare_stages(
    observe: Observer,
    engine: Engine,
    oracle: Engine,
    golden: Golden,
    model: Path,
    ids: Sequence[int],
    spans: Sequence[range],
) -> None:
    """Hold every stage to the lane's bound in each span of positions; name the first wrong one.

    Where noise decides between experts the oracle follows the engine's choice (`stages.routing`).
    """
    (lane, limit), first, last = bound(engine, golden), spans[0].start, spans[-1].stop - 1
    candidate, reference = traces.capture(engine, ids), traces.capture(oracle, ids)
    routes = (
        routing.follow(oracle, lane, candidate, reference.stages) if isinstance(oracle, Embedded) else None
    )
    if routes is not None:
        reference = replace(reference, stages=routes.stages)
    noise = Noise(engine, golden, ids, first, routing.chosen_by(oracle, reference.stages))
    pairs = list(traces.pairs(candidate, reference))
    observe.expect(bool(pairs), "the traces have no stage in common")
    table = stage_table(model)
    errors: dict[str, float] = {}
    drowned: dict[str, float] = {}  # stages that the lane's own noise leaves as far off as the engine's
    parts = parted(spans, first, routes)
    for name, got, expected in pairs:
        observe.expect(
            got.size == expected.size and len(got) == len(expected),
            f"{name} is the first wrong stage: expected shape {expected.shape}, got {got.shape}",
        )
        got, expected = traces.rows(got)[first:], traces.rows(expected)[first:]
        observe.saw(got.size, oracle="float64 oracle's trace of the same ids")
        observe.expect(bool(np.isfinite(got).all()), f"{name} is the first wrong stage: NaN or infinity")
        refused = routes.wrong.get(name, "") if routes is not None else ""
        observe.expect(not refused, f"{name} is the first wrong stage: {refused}")
        apart = [nmse(expected[part], got[part]) for _, part in parts]
        errors[name] = max(apart)
        before = list(errors.values())[:-1]
        beyond = [part for (_, part), error in zip(parts, apart, strict=True) if error > limit]
        if beyond and all(noise.explains(name, expected[part], got[part], part) for part in beyond):
            drowned[name] = errors.pop(name)
            continue
        unseen = hidden(table[name], table, candidate.stages)
        gap = f", {len(unseen)} more were not shown, {unseen[0]} the first" if unseen else ""
        span, _ = parts[int(np.argmax(apart))]
        observe.expect(
            errors[name] <= limit,
            f"{name} is the first wrong stage: NMSE {errors[name]:.3g} at positions "
            f"{span.start}-{span.stop - 1}, at most {limit:.2g} in lane {lane.name}; "
            f"the {len(before)} stages before it were within{gap}",
            stages=errors,
            unseen=list(unseen),
        )
    worst = max(errors, key=errors.__getitem__)
    observe.metric("worst NMSE", errors[worst], at_most=limit)
    observe.note(stages=errors, within_own_noise=drowned)
    own = f"; {len(drowned)} more within the lane's noise in that stage alone" if drowned else ""
    observe.say(
        f"{len(errors)} stages at positions {first}-{last}, worst NMSE {errors[worst]:.2g} at {worst}{own}"
        + (f"; {routing.said([routes], first)}" if routes else "")
    )


STAGE_FAULTS = (
    "rms_eps_from_wrong_key",
    "rope_pairing",
    "rope_base_default",
    "gqa_interleaved",
    "mask_off_by_one",
    "gate_up_swapped",
    "gelu_erf",
    "layer_norm_no_bias",
    "router_bias_dropped",
    "experts_exchanged",
    "close_experts_exchanged",
    "window_in_other_layers",
    "head_size_from_width",
    "queries_not_normed",
    "post_norms_left_out",
    "second_base_ignored",
)


@check("stages.early", kills=STAGE_FAULTS, needs=(Capability.TRACE,))
def test_early(
    observe: Observer, engine: Engine, oracle: Engine, golden: Golden, model_path: Path, text: list[int]
) -> None:
    """Every stage is right on the first 64 positions."""
    early = text[:EARLY]
    compare_stages(observe, engine, oracle, golden, model_path, early, [range(len(early))])


@check(
    "stages.late",
    kills=(
        "cache_evicts",
        "rope_late_positions_stuck",
        "mask_restarts_at_tile",
        "learned_positions_wrap",
        "late_split_not_rescaled",
        "late_last_row_repeated",
        "late_window_wider",
        "late_position_of_ten_bits",
        "late_rows_of_head_repeated",
    ),
    needs=(Capability.TRACE,),
)
def test_late(
    observe: Observer, engine: Engine, oracle: Engine, golden: Golden, model_path: Path, text: list[int]
) -> None:
    """Every stage is still right past position 256, or past half of a shorter context, to the very end of a
    small model's; the last 64 positions, and each stretch as long as all before it, by themselves."""
    spans = late_spans(golden)
    observe.expect(len(text) == spans[-1].stop, f"{len(text)} ids, {spans[-1].stop} needed")
    compare_stages(observe, engine, oracle, golden, model_path, text, spans)


@check(
    "stages.complete",
    kills=(
        "stage_missing",
        "stage_misnamed",
        "stage_unknown",
        "trace_order_reversed",
        "trace_last_row_only",
        "trace_of_last_request",
    ),
    needs=(Capability.TRACE,),
)
def test_complete(
    observe: Observer, engine: Engine, oracle: Engine, model_path: Path, text: list[int]
) -> None:
    """The oracle names every stage of the architecture, in order; the engine names none out of order."""
    wanted = list(stage_table(model_path))
    names = [name for name, _ in oracle.trace(text[:4])]
    observe.saw(len(wanted), oracle="the stages that the model's nodes name")
    observe.expect(
        names == wanted,
        f"the oracle's stages: expected {len(wanted)}, got {len(names)}; "
        f"first difference {next((p for p in zip(wanted, names, strict=False) if p[0] != p[1]), None)}",
    )
    own: Trace = traces.capture(engine, text[:4])
    known = [name for name in wanted if name in own.stages]
    observe.expect(
        known == list(own.stages), f"the engine's stages are out of order: {list(own.stages)[:8]}…"
    )
    observe.expect("logits" in own.stages, "the engine's trace does not end in logits")
    if Capability.REPLACE in engine.info.capabilities:
        # A black box shows what it has; one whose stages can be replaced owes them all, row for row.
        lost = [name for name in wanted if name not in own.stages]
        observe.expect(not lost, f"the engine shows no {', '.join(lost[:5])}")
        observe.expect(not own.unknown, f"no table has the stages {', '.join(own.unknown[:5])}")
        short = [name for name, array in own.stages.items() if len(array) != len(own.ids)]
        observe.saw(len(own.stages), oracle="one row for each id")
        observe.expect(not short, f"{len(own.ids)} ids gave fewer rows of {', '.join(short[:5])}")
    observe.say(f"{len(wanted)} stages of the oracle in order; {len(known)} of the engine's match them")


@check(
    "stages.untouched",
    kills=("trace_pointers_alias", "trace_changes_result"),
    needs=(Capability.TRACE, Capability.LOGITS),
)
def test_untouched(
    observe: Observer, engine: Engine, oracle: Engine, golden: Golden, text: list[int]
) -> None:
    """Tracing changes nothing: same logits as untraced, and every array is a copy of its own."""
    ids = text[:EARLY]
    plain = engine.logits(ids)
    stages = dict(engine.trace(ids))
    again = engine.logits(ids)
    traced = np.asarray(stages["logits"], np.float32)
    observe.saw(plain.size * 2, oracle="the engine's own untraced logits")
    observe.expect(bool(np.array_equal(plain, traced)), "the traced logits are not the untraced ones")
    observe.expect(
        bool(np.array_equal(plain, again)), "the logits after a traced run are not those before it"
    )
    arrays = list(stages.items())
    for (name, array), (other, next_array) in pairwise(arrays):
        shared = bool(np.shares_memory(array, next_array))
        observe.expect(not shared, f"{name} and {other} share one buffer")
    ends = tuple(f"blk.{n}.out" for n in (0, int(engine.info.config["n_layers"]) - 1))
    if len(arrays) >= 40 and np.array_equal(stages[ends[0]], stages[ends[1]]):
        # They are where the layers between add zeros, or less to the stream than its rounding takes away,
        # and then not for a buffer that all stages share.
        true = traces.capture(oracle, ids).stages
        first, last = (traces.rows(true[end]) for end in ends)
        moved, (_, limit) = nmse(first, last), bound(engine, golden)
        observe.expect(
            moved <= limit or Noise(engine, golden, ids, 0).explains(ends[1], last, first),
            f"the outputs of the first and last layer are equal; the oracle's are apart by NMSE {moved:.3g}",
        )
    observe.say(
        f"{plain.size} logits bit-equal with and without tracing; {len(arrays)} arrays, no two share memory"
    )
