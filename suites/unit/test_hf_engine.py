"""Transformers on a GGUF file is judged as any engine is: right where its reader is, and wrong elsewhere."""

from __future__ import annotations

import msgspec
import pytest

from prill_harness.engines.base import Capability, Engine
from prill_harness.engines.models import resolve_model
from prill_harness.faults.opening import open_engine
from prill_harness.numbers import lanes
from prill_harness.records.evidence import Status
from prill_harness.stages import trace
from prill_harness.stages.bisect import Report, bisect
from prill_harness.stages.bounds import stage_bounds
from prill_harness.stages.subject import open_subject
from prill_harness.tokens.golden import Golden, golden_for
from prill_harness.tokens.golden_pack import Packed
from prill_harness.tokens.judge import compare_prompt_ids, compare_teacher_forced
from prill_harness.tokens.steps import oracle_for
from prill_harness.tokens.verify import verified
from prill_runtime.errors import EngineError, MissingCapability, UsageError

pytest.importorskip("torch", reason="needs the extra hf")
pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("accelerate", reason="transformers needs it to read a GGUF file")
pytestmark = pytest.mark.hf
COUNT = 12


def some(model: str) -> Golden:
    """The model's golden with two of its prompts and a few tokens of each."""
    whole = golden_for(model)
    prompts = [
        msgspec.structs.replace(
            each, tokens=each.tokens[:COUNT], sampled=[], top_ids=Packed.of(each.top_ids.array[:COUNT]),
            top_logprobs=Packed.of(each.top_logprobs.array[:COUNT]),
        )
        for each in whole.prompts[:2]
    ]  # fmt: skip
    return msgspec.structs.replace(whole, prompts=prompts)


def walked(engine: Engine, model: str) -> Report:
    path, ids = resolve_model(model), golden_for(model).prompts[0].ids[:24]
    with open_engine("numpy64", model) as oracle, open_subject(path) as subject:
        limits = stage_bounds(path, lanes.EXACT, ids, trace.capture(oracle, ids).stages)
        return bisect(engine, oracle, ids, subject, limits)


@pytest.mark.parametrize(("name", "shown"), [("llama-tiny", 55), ("gpt2-tiny", 51)])
def test_it_is_right(name: str, shown: int) -> None:
    """Ids, logits, its own greedy texts with 20 logprobs at each position, and every stage that its modules
    show, in the exact lane."""
    model = f"fixture:{name}"
    golden = some(model)
    with open_engine("hf", model) as engine, oracle_for(engine) as oracle:
        offered = {Capability.TOKENIZE, Capability.LOGITS, Capability.GENERATE, Capability.TRACE}
        assert engine.info.capabilities == offered
        assert (engine.info.arithmetic, engine.info.draws, engine.info.device) == ("float32", "own", "cpu")
        reading = verified(engine, golden, oracle, COUNT)
        found = [compare_prompt_ids(engine, golden, oracle), compare_teacher_forced(engine, golden, oracle)]
        found += [reading.choices(), reading.numbers()]
        report = walked(engine, model)
    assert [each.status for each in found] == [Status.PASSED] * 4, [each.sentence for each in found]
    assert found[3].observed == 2 * COUNT * 20
    assert report.ok, report.sentence
    assert len(report.stages) == shown


def test_what_its_reader_drops_is_named() -> None:
    """Of a Llama with biases and a window its reader keeps neither: the first wrong stage lacks its bias."""
    with open_engine("hf", "fixture:llama-window") as engine:
        report = walked(engine, "fixture:llama-window")
    assert report.sentence.startswith("blk.0.q is the first wrong stage"), report.sentence
    assert "explained by: bias of blk.0.attn_q left out" in report.sentence


def test_requests_end_as_they_are_asked() -> None:
    """Lengths, a stop string, the end of the text ignored, seeds; what it cannot be asked is missing."""
    model = "fixture:llama-tiny"
    with open_engine("hf:cpu,arithmetic=float64", model) as engine:
        assert engine.info.arithmetic == "float64"
        ids = golden_for(model).prompts[0].ids
        whole = engine.generate(ids, max_tokens=COUNT)
        assert (len(whole.ids), whole.finish_reason) == (COUNT, "length")
        assert engine.generate(ids, max_tokens=0).ids == ()
        assert engine.generate(ids, max_tokens=COUNT, ignore_eos=True).ids == whole.ids
        stop = engine.detokenize(whole.ids[:4]).decode().strip()[-3:]
        cut = engine.generate(ids, max_tokens=COUNT, stop=[stop])
        assert cut.finish_reason == "stop"
        assert cut.ids == whole.ids[: len(cut.ids)]
        drawn = [engine.generate(ids, max_tokens=COUNT, temperature=2.0, seed=seed).ids for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        with pytest.raises(MissingCapability, match="on_token"):
            engine.generate(ids, max_tokens=2, on_token=lambda token, logprob: None)
        with pytest.raises(EngineError):
            engine.logits([10**6])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("hf:gpu", "unknown device"),
        ("hf:arithmetic=int8", "does not compute so"),
        ("hf:cpu,arithmetic=x", "unknown"),
    ],
)
def test_specs_that_cannot_be_are_refused(spec: str, said: str) -> None:
    """A device that is none, an arithmetic that PyTorch does not have here."""
    with pytest.raises(UsageError, match=said):
        open_engine(spec, "fixture:llama-tiny")
