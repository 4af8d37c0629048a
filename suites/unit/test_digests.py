"""What every engine computes is, bit for bit, what it computed when the digests were recorded.

`make digests` looks at all of them; without it, at a few of each kind. `PRILL_DIGESTS=record` records them
anew, which belongs into a commit that says why they changed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from .digests import ENGINES, FEW, MODELS, arithmetic, digests

RECORD = Path(__file__).parent / "data" / "digests.json"
HOW = os.environ.get("PRILL_DIGESTS", "few")
ALL = [(model, engine) for model in MODELS for engine in ENGINES]


@pytest.mark.parametrize(("model", "engine"), FEW if HOW == "few" else ALL)
def test_the_same_bits_as_recorded(model: str, engine: str, tmp_path: Path) -> None:
    """Logits of a prompt and of the steps behind it, and every stage; where the arithmetic under them is
    another machine's, which fixed sums by the machine alone tell, nothing is compared."""
    known = json.loads(RECORD.read_text()) if RECORD.is_file() else {"arithmetic": {}, "logits": {}}
    here = arithmetic(engine)
    if HOW == "record":
        known["arithmetic"][engine] = here
        known["logits"].setdefault(model, {})[engine] = digests(model, engine, tmp_path)
        RECORD.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        return
    if here != known["arithmetic"][engine]:
        pytest.skip("other machine's arithmetic: sums and functions of the machine itself differ")
    assert digests(model, engine, tmp_path) == known["logits"][model][engine]


def test_every_model_is_recorded() -> None:
    """No model and no engine has fallen out of the record, and none of its digests is another's."""
    known = json.loads(RECORD.read_text())["logits"]
    assert set(known) == set(MODELS)
    assert all(set(engines) == set(ENGINES) for engines in known.values())
    prompts = [found["prompt"] for engines in known.values() for found in engines.values()]
    assert len(set(prompts)) > 0.6 * len(prompts)
