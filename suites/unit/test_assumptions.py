"""What a file leaves open is said, with what is assumed of it; a file that says everything leaves nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prill_harness.faults.opening import open_engine
from prill_harness.plan import provenance
from prill_harness.tokens.golden import record
from prill_harness.tokens.judge import compare_config
from prill_harness.witness.declared import declared
from prill_runtime.gguf.file import open_gguf
from prill_runtime.models.assumptions import assumptions, remarks
from prill_runtime.tokenizer.load import load_tokenizer

from .commandline import child, emitted, invoke
from .test_tokenizer import bpe, spm
from .tiny_gguf import tiny
from .vocabularies import bpe as any_bpe
from .vocabularies import spm as any_spm

TEXT = {"add_bos_token": False, "add_space_prefix": True}
GUESSED = "bos and eos control, <0xXX> a byte, unk unknown, all else normal"
REFUSED = "nothing: it is refused"
WHOLE = {"spm": spm(**TEXT), "bpe": bpe(add_bos_token=False)}


@dataclass
class Described:
    """A file of which only the metadata matters."""

    metadata: dict[str, Any]
    architecture: str = "llama"


def said(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, assumed), the keys without their prefix."""
    found = assumptions(Described({"llama.context_length": 64, **metadata}))
    assert all(each.why and each.assumed for each in found)
    return [(each.key.removeprefix("tokenizer.ggml."), each.assumed) for each in found]


@pytest.mark.parametrize("family", ["spm", "bpe"])
def test_a_file_that_says_everything_leaves_nothing_open(family: str) -> None:
    """With every key in place there is no assumption; nor is there of the packaged models."""
    assert said(WHOLE[family]) == []
    assert provenance.assumed("fixture:llama-tiny") == provenance.assumed("fixture:gpt2-tiny") == ()


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (spm(**{**TEXT, "add_bos_token": None}), ("add_bos_token", "true")),
        (bpe(), ("add_bos_token", "false")),
        (bpe(pre="llama-bpe"), ("add_bos_token", "true")),
        (bpe(add_bos_token=False, pre=None), ("pre", "default")),
        (bpe(add_bos_token=False, pre="default"), ("pre", "default")),
        (bpe(pre="klingon"), ("pre", REFUSED)),
        (bpe(add_bos_token=True, bos_token_id=None), ("bos_token_id", "none, so that no BOS is added")),
        (bpe(add_bos_token=False, eos_token_id=None), ("eos_token_id", "none")),
        (spm(**TEXT, token_type=None), ("token_type", GUESSED)),
        (spm(**TEXT, scores=None), ("scores", "0 for every token")),
        (spm(add_bos_token=False), ("add_space_prefix", "true")),
        (spm(**TEXT) | {"tokenizer.chat_template": "{{ bos_token }}x"}, None),
        (spm(add_bos_token=True, add_space_prefix=True) | {"tokenizer.chat_template": "<s>[INST]"},
         ("tokenizer.chat_template", "two BOS are kept as two")),
        (WHOLE["spm"] | {"llama.rope.scaling.factor": 4.0}, ("llama.rope.scaling.type", "linear")),
        (WHOLE["spm"] | {"llama.rope.scaling.type": "mystery"}, ("llama.rope.scaling.type", REFUSED)),
        (WHOLE["spm"] | {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
         ("llama.rope.scaling.factor", "1")),
        (WHOLE["spm"] | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
         ("llama.rope.scaling.original_context_length", "64, the context length")),
    ],
)  # fmt: skip
def test_what_is_left_open_is_said(metadata: dict[str, Any], expected: tuple[str, str] | None) -> None:
    """A key that is missing, unclear or contradicted is named, with what is assumed."""
    found = said(metadata)
    assert (expected in found) if expected else not found


def test_an_end_by_its_text_alone_is_said() -> None:
    """A token that ends a text though the file marks it as another kind is named."""
    types = list(spm()["tokenizer.ggml.token_type"])  # type: ignore[call-overload]
    types[266] = 4
    (found,) = assumptions(Described(spm(**TEXT, token_type=types)))
    assert found.assumed == "'<|im_end|>' ends a text"
    assert "user-defined" in str(found)


def test_bytes_without_tokens_are_said() -> None:
    """A vocabulary that cannot spell all bytes says what becomes of text that needs them."""
    few = {"tokens": ["<unk>", "a", "b"], "token_type": [2, 1, 1], "scores": [0.0] * 3, "bos_token_id": None}
    found = said(spm(**TEXT, **few, eos_token_id=1))
    assert ("tokens", "what needs them becomes the unknown token") in found


@settings(deadline=None, max_examples=60)
@given(
    metadata=any_spm() | any_bpe(), pre=st.none() | st.text(max_size=5), scale=st.none() | st.integers(-1, 9)
)
def test_any_metadata_is_described(metadata: dict[str, Any], pre: str | None, scale: int | None) -> None:
    """Whatever a file holds, describing it raises nothing, and each assumption is one printable line."""
    extra = {"tokenizer.ggml.pre": pre, "llama.rope.scaling.factor": scale, "llama.rope.scaling.type": pre}
    metadata |= {key: value for key, value in extra.items() if value is not None}
    for each in assumptions(Described(metadata)):
        assert all(each), each
        assert len(str(each)) < 400


def test_bos_twice_and_lost_text_are_remarks() -> None:
    """A prompt that spells BOS before a tokenizer that adds it, and text without tokens, are said."""
    tokenizer = load_tokenizer(spm())
    (twice,) = remarks(tokenizer, "<s>ab", tokenizer.encode("<s>ab"))
    assert "BOS twice" in twice
    assert remarks(tokenizer, "ab<s>", tokenizer.encode("ab<s>")) == ()
    few = load_tokenizer(
        spm(tokens=["▁", "a"], token_type=[1, 1], scores=[0.0] * 2, bos_token_id=None, eos_token_id=None,
            unknown_token_id=None)
    )  # fmt: skip
    (lost,) = remarks(few, "a🐟a", few.encode("a🐟a"))
    assert lost.startswith("1 characters")


def scaled(*steps: tuple[str, Any]) -> Callable[[gguf.GGUFWriter], None]:
    def describe(writer: gguf.GGUFWriter) -> None:
        for name, value in steps:
            if isinstance(value, str):
                writer.add_string(f"llama.rope.{name}", value)
            else:
                writer.add_float32(f"llama.rope.{name}", value)

    return describe


@pytest.mark.parametrize(
    ("steps", "kind", "factor"),
    [
        ([("scaling.factor", 2.0)], "linear", 2.0),
        ([("scale_linear", 2.0)], "linear", 2.0),
        ([("scaling.type", "none"), ("scaling.factor", 2.0)], "none", 1.0),
        ([("scaling.type", "linear"), ("scaling.factor", 2.0), ("scale_linear", 4.0)], "linear", 2.0),
        ([("scaling.factor", 1.0)], "none", 1.0),
        ([], "none", None),
    ],
)
def test_the_scaling_that_a_file_declares_is_the_one_in_use(
    steps: list[tuple[str, Any]], kind: str, factor: float | None, tmp_path: Path
) -> None:
    """Kind and factor, read apart from the runtime, are what the engine reports, whatever is missing."""
    path = tiny(tmp_path / "m.gguf", metadata=scaled(*steps))
    with open_gguf(path) as file:
        stated = declared(file)
    assert (stated["rope_scaling"], stated.get("rope_factor")) == (kind, factor)
    with open_engine("numpy", str(path)) as engine:
        assert compare_config(engine, record(path, ["ab"], tokens=1)).ok


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose file does not say how positions are scaled, nor whether a text begins with a space."""
    folder = tmp_path_factory.mktemp("silent")
    return tiny(folder / "silent.gguf", metadata=scaled(("scaling.factor", 2.0)))


def test_inspect_run_and_golden_say_what_is_assumed(silent: Path, tmp_path: Path) -> None:
    """inspect lists it, as text and as JSON; run says it; golden record says it, and BOS twice."""
    assert "llama.rope.scaling.type: linear" in invoke("inspect", str(silent)).stdout
    listed = emitted(invoke("inspect", str(silent), "--json").stdout)["assumptions"]
    assert {"add_space_prefix", "type"} <= {each["key"].rpartition(".")[2] for each in listed}
    run = child("run", "--model", str(silent), "--out", str(tmp_path / "run"), "tokenizer.ends")
    assert "assumed llama.rope.scaling.type: linear" in run.stderr
    made = invoke(
        "golden", "record", str(silent), "-o", str(tmp_path / "g.json"), "--tokens", "2", "--prompt", "<s> ab"
    )
    assert "assumed llama.rope.scaling.type: linear" in made.stderr
    assert "prompt 0: the prompt begins with BOS twice" in made.stderr


def test_generate_says_bos_twice_and_which_token_ended(tmp_path: Path) -> None:
    """A prompt that begins with two BOS is remarked on; the token that ended the text is named."""

    def one_way(tensors: dict[str, Any]) -> None:
        for name, values in tensors.items():
            values[...] = (
                0.0 if name.endswith(("attn_output.weight", "ffn_down.weight", "output.weight")) else 1.0
            )
        tensors["output.weight"][2] = 1.0

    path = tiny(tmp_path / "ends.gguf", edit=one_way)
    done = invoke("generate", "--model", str(path), "--prompt", "<s> ab", "--max-tokens", "3", "--json")
    assert "BOS twice" in done.stderr
    assert "ended by eos (id 2 '</s>', by eos_token_id)" in done.stderr
    assert emitted(done.stdout)["ended_by"] == {"id": 2, "text": "</s>", "by": "eos_token_id"}
    free = invoke(
        "generate", "--model", str(path), "--prompt", "ab", "--max-tokens", "3", "--json", "--ignore-eos"
    )
    assert emitted(free.stdout)["ended_by"] is None
    assert "BOS" not in free.stderr
