"""Whether transformers, if asked, confirms the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prill_harness.engines.embedded import Embedded
from prill_harness.numbers import lanes
from prill_harness.numbers.compare import nmse
from prill_harness.run.checks import Observer
from prill_harness.tokens.golden import Golden
from prill_harness.witness import second, sensitivity
from prill_harness.witness.reading import Reading
from prill_suites.common import SAME

TRANSFORMERS = "Hugging Face transformers on the same weights"
SHARED = "what the engine shares with it (loader, configuration, graph, ops)"


def bound(golden: Golden) -> float:
    """The NMSE that two passes may be apart of which one has norms and softmax in float32."""
    return max(SAME["float32"], lanes.bounds(lanes.EXACT, golden.floors["exact"]).nmse)


def confirmed(
    observe: Observer, oracle: Embedded, golden: Golden, reading: Reading, ids: Sequence[int], path: Path
) -> str:
    """Hold the oracle to transformers; a clause.

    Raises:
        Inconclusive: its model of the architecture lacks something that the file says.
    """
    layers, depth = "", int(reading.key("block_count"))
    if second.parameters(reading) > second.MOST_PARAMETERS:
        reading = sensitivity.shallow(reading)
        got = sensitivity.oracle_logits(path, reading, ids)
        layers = f"the first {reading.key('block_count')} of {depth} layers, "
    else:
        got = np.asarray(oracle.logits(ids), np.float64)
    expected = second.logits(reading, ids)
    observe.saw(expected.size, oracle=TRANSFORMERS)
    error = nmse(expected, got)
    observe.metric(
        "oracle against transformers NMSE",
        error,
        at_most=bound(golden),
        otherwise=f"the oracle is wrong on this file: NMSE {error:.3g} to {TRANSFORMERS}, at most "
        f"{bound(golden):.2g}; {SHARED} is to blame",
    )
    return f"{layers}NMSE {error:.2g} to {TRANSFORMERS}"
