"""An engine of others that takes prompts alone is found wrong on Llama, and why: it pairs as NeoX does."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import msgspec
import pytest

from prill_harness.faults.opening import open_engine
from prill_harness.records.evidence import Status
from prill_harness.stages.written import explained
from prill_harness.tokens.golden import golden_for
from prill_harness.tokens.steps import oracle_for
from prill_harness.tokens.verify import verified

BINARY = shutil.which("memvanta-real", path=str(Path(sys.executable).parent))
pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(BINARY is None, reason="needs memvanta: make test-engines installs it"),
]
COMMAND = f"exec:{BINARY} --model {{model}} --prompt {{prompt}} --n {{tokens}} --threads 1 --ctx 512"
AS_TEXT = " --temperature 0,adapter=text,skip=1,arithmetic=float32"
MODEL, COUNT = "fixture:llama-tiny:f32", 24


def test_its_mistake_is_named() -> None:
    """Its texts are not the oracle's at the first token, equal those of the planted fault, and the clause of
    that fault is the explanation."""
    golden = golden_for(MODEL)
    golden = msgspec.structs.replace(golden, prompts=sorted(golden.prompts, key=lambda p: len(p.ids))[:2])
    with open_engine(f"{COMMAND}{AS_TEXT}", MODEL) as engine, oracle_for(engine) as oracle:
        found = explained(verified(engine, golden, oracle, COUNT).choices(), oracle)
    assert found.status is Status.FAILED
    assert found.sentence.startswith("prompt 0, token 0: expected "), found.sentence
    assert "; explained by: pairs (i, i+d/2) instead of (2i, 2i+1)" in found.sentence
    with open_engine("numpy+fault:rope_pairing", MODEL) as planted:
        for prompt, wrong in zip(golden.prompts, found.detail["wrong_texts"], strict=True):
            made = planted.generate(prompt.ids, max_tokens=COUNT)
            assert planted.detokenize(made.ids).decode().strip() == wrong["text"].strip()
