"""Each family runs on every engine, whole prompts, single steps and batches, as the oracle says it should."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from prill_harness.engines.embedded import Embedded
from prill_harness.faults.opening import open_engine
from prill_harness.numbers.compare import nmse
from prill_harness.stages.subject import stage_table
from prill_harness.witness import naive as witness
from prill_harness.witness import sensitivity
from prill_harness.witness.declared import declared, same
from prill_runtime.device.model import DeviceModel
from prill_runtime.gguf.file import open_gguf
from prill_runtime.models import registry, walks
from prill_runtime.models.load import describe
from prill_suites.witness import SUMMED

from .decoded import decoded
from .families import FAMILIES, VOCAB, described, write

PROMPT, STEPS = 24, 4  # enough rows for the tensor cores; behind them phi3 has its long divisors
IDS = np.random.default_rng(3).integers(0, VOCAB, PROMPT + STEPS).tolist()
QUANTISED = {"numpy": 1e-11, "emu": 1e-11, "emu:fast": 1e-3}  # by int8 activations in fused steps
BOUNDS = {"numpy": 1e-11, "emu": 1e-11, "emu:fast": 1e-5}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A file, and the oracle's logits of a prompt, of the steps behind it, and of a batch."""
    path = write(request.param, tmp_path_factory.mktemp("family") / "m.gguf")
    with open_engine("numpy64", path) as oracle:
        yield path, everything(oracle)


def everything(opened: Any) -> dict[str, NDArray[np.float64]]:
    assert isinstance(opened, Embedded)
    model = opened.model
    cache = model.new_cache(PROMPT + STEPS)
    found = {"prompt": model.forward([(cache, IDS[:PROMPT])])[0]}
    steps = []
    for token in IDS[PROMPT:]:
        if isinstance(model, DeviceModel):
            steps.append(decoded(model, cache, token)[None])  # type: ignore[arg-type]
        else:
            steps.append(model.forward([(cache, [token])])[0])
    found["decode"] = np.concatenate(steps)
    parts = [IDS[low : low + length] for low, length in ((0, 28), (3, 9), (5, 1))]
    caches = [model.new_cache(len(part)) for part in parts]
    found["batch"] = np.concatenate(model.forward(list(zip(caches, parts, strict=True))))
    for each in (cache, *caches):
        if isinstance(model, DeviceModel):
            each.close()  # type: ignore[attr-defined]
    return {name: np.asarray(array, np.float64) for name, array in found.items()}


@pytest.mark.parametrize("engine", BOUNDS)
def test_a_family_runs_on_every_engine(engine: str, family: Any) -> None:
    """Prompt, replayed single steps and a batch of three lengths, each within the engine's own noise."""
    path, expected = family
    with open_engine(engine, path) as opened:
        got = everything(opened)
    for name, want in expected.items():
        assert got[name].shape == want.shape
        assert np.std(want) > 0.1
        noise = float(np.mean((got[name] - want) ** 2) / np.mean(want**2))
        print(f"{path.parent.name} {engine} {name}: NMSE {noise:.1e}")
        assert noise < BOUNDS[engine], name


@pytest.mark.parametrize("engine", ["numpy", "emu", "emu:fast"])
@pytest.mark.parametrize(
    ("arch", "type", "experts"),
    [("gpt-oss", T.Q8_0, T.MXFP4), ("qwen3moe", T.F16, T.Q4_0), ("gemma2", T.Q8_0, None),
     ("phi3", T.BF16, None), ("qwen2", T.Q4_0, None)],
)  # fmt: skip
def test_blocks_are_multiplied_as_they_lie(
    arch: str, type: T, experts: T | None, engine: str, tmp_path: Path
) -> None:
    """Quantised matrices, those of experts among them, on every engine: MXFP4 beside Q8_0 as in gpt-oss."""
    path = write(arch, tmp_path / "m.gguf", type, experts)
    with open_engine("numpy64", path) as oracle, open_engine(engine, path) as opened:
        expected, got = everything(oracle), everything(opened)
    for name, want in expected.items():
        noise = float(np.mean((got[name] - want) ** 2) / np.mean(want**2))
        print(f"{arch} {type.name} {engine} {name}: NMSE {noise:.1e}")
        assert noise < QUANTISED[engine], name


def test_stages_are_those_of_the_table(family: Any) -> None:
    """What a trace shows, in its order, is what the nodes said it would."""
    path, _ = family
    with open_engine("emu", path) as engine:
        assert [name for name, _ in engine.trace(IDS[:5])] == list(stage_table(path))


def test_every_key_and_tensor_counts(family: Any, tmp_path: Path) -> None:
    """Each value of the family's own keys, changed, moves the logits, or is refused."""
    path, expected = family
    arch = next(name for name, (keys, _) in FAMILIES.items() if name == architecture(path))
    own = {"rope.freq_base": 5000.0, "attention.sliding_window": 5, "rope.freq_base_swa": 500.0,
           "attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0, "expert_used_count": 2,
           "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 1.5,
           "rope.scaling.original_context_length": 8 if arch == "phi3" else 30,
           "rope.scaling.yarn_log_multiplier": 0.5, "attention.temperature_scale": 0.4,
           "use_parallel_residual": False, "rope.dimension_count": 2}  # fmt: skip
    changed = [key for key in FAMILIES[arch][0] if key in own]
    assert changed
    for key in changed:
        if key == "rope.dimension_count" and arch == "phi3":
            continue  # its divisors fix it
        other = write(arch, tmp_path / "other.gguf", **{key.replace(".", "__"): own[key]})
        with open_engine("numpy64", other) as engine:
            assert isinstance(engine, Embedded)
            got = engine.model.forward([(engine.model.new_cache(PROMPT), IDS[:PROMPT])])[0]
        assert np.abs(got - expected["prompt"]).max() > 1e-3, key


def architecture(path: Path) -> str:
    with open_engine("numpy", path) as engine:
        assert isinstance(engine, Embedded)
        return str(engine.model.config["architecture"])


def test_every_description_is_tried() -> None:
    """All architectures with a file but the two that have fixtures."""
    assert set(registry.names()) - {"llama", "gpt2"} == set(FAMILIES)


FEATURES = {
    "qwen2": {"rms_norm", "rope", "yarn", "gqa", "bias", "silu", "gate", "tied"},
    "qwen3": {"rms_norm", "rope", "gqa", "qk_norm", "silu", "gate"},
    "qwen3moe": {"rms_norm", "rope", "gqa", "qk_norm", "experts", "silu", "gate"},
    "phi3": {"rms_norm", "rope", "longrope", "gqa", "fused_qkv", "window", "silu", "gate", "fused_gate_up"},
    "gemma2": {"rms_norm", "rope", "gqa", "post_norm", "softcap", "window", "gelu_tanh", "gate", "tied",
               "embedding_scale", "logit_softcap"},
    "gemma3": {"rms_norm", "rope", "two_bases", "gqa", "qk_norm", "post_norm", "window", "gelu_tanh", "gate",
               "tied", "embedding_scale"},
    "gptneox": {"layer_norm", "rope", "fused_qkv", "bias", "gelu_erf", "parallel"},
    "mistral3": {"rms_norm", "rope", "yarn", "gqa", "temperature", "silu", "gate"},
    "gpt-oss": {"rms_norm", "rope", "yarn", "gqa", "bias", "sinks", "window", "experts", "expert_bias",
                "clamped", "gate"},
}  # fmt: skip


@pytest.mark.parametrize("arch", FEATURES)
def test_features_say_what_a_family_has(arch: str) -> None:
    """By these, items and faults are chosen."""
    assert walks.features(described(arch, *FAMILIES[arch])) == FEATURES[arch]


def test_windows_stand_where_the_family_has_them() -> None:
    """Gemma 2 and gpt-oss: in even layers; Gemma 3: in all but each sixth; phi3: in all."""
    windows = {arch: [layer.attention.window for layer in described(arch, *FAMILIES[arch]).layers]
               for arch in ("gemma2", "gpt-oss", "gemma3", "phi3", "qwen3")}  # fmt: skip
    assert windows == {"gemma2": [7, None], "gpt-oss": [7, None], "gemma3": [7] * 5 + [None, 7],
                       "phi3": [16, 16], "qwen3": [None, None]}  # fmt: skip


def test_gemmas_scale_its_scores_by_the_head() -> None:
    """But for the 27B, by its width over its heads, which no key says."""
    keys, optional = FAMILIES["gemma2"]
    large = {"embedding_length": 4608, "attention.head_count": 32, "attention.head_count_kv": 16,
             "attention.key_length": 128, "attention.value_length": 128}  # fmt: skip
    for more, scale in (({}, 64**-0.5), (large, 144**-0.5)):
        network = described("gemma2", keys | more, optional)
        assert network.layers[0].attention.scale == pytest.approx(scale)


# What ten ids do not show: queries are late from twelve on, and two layers have no sixth.
QUIET = {"mistral3": {"attention.temperature_scale"}, "gemma3": {"rope base", "rope scaling factor"}}


def test_the_witness_reads_each_family_alike(family: Any) -> None:
    """As the file is and with each thing changed that can be, to float64's own rounding."""
    path, expected = family
    whole = witness.read(path)
    assert nmse(witness.logits(whole, IDS[:PROMPT]), expected["prompt"]) <= SUMMED
    base = sensitivity.shallow(whole)
    before = witness.logits(base, IDS[:10])
    seen = [each.name for each in sensitivity.variations(base, 10)]
    assert {"eps", "rope base"} < set(seen)
    for variation in sensitivity.variations(base, 10):
        want = witness.logits(variation.reading, IDS[:10])
        got = sensitivity.oracle_logits(path, variation.reading, IDS[:10])
        assert nmse(want, got) <= SUMMED, variation.name
        if variation.name not in QUIET.get(whole.architecture, ()):
            assert nmse(before, want) > 1e-12, variation.name


def test_what_a_family_declares_is_what_an_engine_reports(family: Any) -> None:
    """The file's own words and its format's defaults, read apart, against the nodes."""
    path, _ = family
    with open_gguf(path) as file:
        stated, found = declared(file), walks.effective(describe(file))
    assert len(stated) > 10
    wrong = {name: (value, found.get(name)) for name, value in stated.items()
             if name not in found or not same(value, found[name])}  # fmt: skip
    assert wrong == {}


@pytest.mark.parametrize("window", [127, 128, 129])
def test_a_window_beside_sinks_is_as_wide_as_the_file_says(window: int, tmp_path: Path) -> None:
    """Around that of the published gpt-oss: the witness agrees with the oracle, in one pass and by tokens,
    and one key more changes nothing before the first position that loses one."""
    keys = {"attention__sliding_window": window, "context_length": 160}
    path, wider = write("gpt-oss", tmp_path / "m.gguf", **keys), window + 1
    other = write("gpt-oss", tmp_path / "w.gguf", **(keys | {"attention__sliding_window": wider}))
    ids = np.random.default_rng(4).integers(0, VOCAB, 140).tolist()
    with open_engine("numpy64", path) as oracle, open_engine("numpy64", other) as second:
        got, apart = oracle.logits(ids), np.abs(oracle.logits(ids) - second.logits(ids)).max(axis=1)
        session = oracle.session(len(ids))
        steps = np.concatenate([session.feed(ids[:120]), *(session.feed([token]) for token in ids[120:])])
    expected = witness.logits(witness.read(path), ids)
    assert nmse(expected, got) < SUMMED
    assert nmse(expected, steps) < SUMMED
    assert not apart[:window].any()
    assert apart[window:].min() > 1e-6
