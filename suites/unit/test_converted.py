"""A gpt-oss file of the making of llama.cpp's converter is read as transformers reads its checkpoint.

converted.py makes the file, and the logits beside it, anew.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prill_harness.faults.catalogue import catalogue
from prill_harness.faults.opening import open_engine
from prill_harness.numbers.compare import nmse
from prill_harness.witness import naive as witness
from prill_runtime.gguf.file import open_gguf
from prill_runtime.models import walks
from prill_runtime.models.load import describe
from prill_runtime.tokenizer.load import Tokenizer, load_tokenizer

from .commandline import invoke
from .converted import FILE, HARMONY, LOGITS, checkpoint, last_eight
from .test_tokenizer_bpe import ANY_TEXT, PUBLISHED

SAME = 1e-11  # NMSE; norms, sinks and rotations of transformers are in float32
PROMPT = ("--prompt", "the miller counts the boats by the river and the old bridge")
Floats = NDArray[np.float64]


def published() -> tuple[list[int], Floats]:
    """Ids, and what transformers says behind the last eight of them: (8, vocabulary)."""
    with np.load(LOGITS) as stored:
        return stored["ids"].tolist(), stored["logits"].astype(np.float64)


def logits(engine: str) -> Floats:
    """What an engine says of the same."""
    ids, _ = published()
    with open_engine(engine, str(FILE)) as opened:
        return np.asarray(opened.logits(ids), np.float64)[-8:]


def test_the_oracle_says_what_transformers_says_of_the_checkpoint() -> None:
    """So does the witness: every block, key and name of the converter's was understood by both."""
    ids, expected = published()
    assert expected.std() > 1
    assert nmse(expected, logits("numpy64")) < SAME
    assert nmse(expected, witness.logits(witness.read(FILE), ids)[-8:]) < SAME


@pytest.mark.hf
def test_transformers_says_so_still(tmp_path: Path) -> None:
    """The recorded logits are those of the checkpoint, made anew, whose tensors are those of the file."""
    pytest.importorskip("torch")
    ids, expected = published()
    model = checkpoint(tmp_path, expected.shape[1])
    assert nmse(expected, last_eight(model, np.array(ids))) < 1e-13
    file = witness.read(FILE)
    own = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj").detach().numpy()  # (expert, in, out)
    assert np.array_equal(own[:, :, 1::2].swapaxes(1, 2), file.all("blk.1.ffn_up_exps.weight"))


FEATURES = {"rms_norm", "rope", "yarn", "gqa", "bias", "sinks", "window", "experts", "expert_bias", "clamped",
            "gate"}  # fmt: skip
OWN = {"yarn", "sinks", "experts", "expert_bias", "clamped"}  # which no other packaged model has
# No two logits of a router are equal here, nor as close as it takes among the ids that bisect asks.
QUIET = {"ties_to_highest_id", "close_experts_exchanged"}
MISTAKES = {
    "mxfp4_nibbles_interleaved": ("expert_gate",),
    "window_off_by_one": ("attn",),
    "gqa_interleaved": ("attn",),
    "softmax_with_sink": ("attn",),
    "rope_scaling_ignored": ("q_rope",),
    "rms_mean_subtracted": ("attn_norm",),
} | {
    fault.name: fault.blames for fault in catalogue().values()
    if OWN & set(fault.needs) and FEATURES.issuperset(fault.needs)
    and "oracle" not in fault.blames and fault.name not in QUIET
}  # fmt: skip


@pytest.mark.parametrize("fault", MISTAKES)
def test_a_mistake_is_found_and_called_by_its_stage(fault: str) -> None:
    """It moves the logits away from those of transformers, and bisect names where it began."""
    _, expected = published()
    assert nmse(expected, logits(f"numpy+fault:{fault}")) > 1e-6
    said = invoke("bisect", "--engine", f"numpy+fault:{fault}", "--model", str(FILE), *PROMPT)
    assert said.exit_code == 1, said.output
    (stage,) = re.findall(r"^blk\.\d\.(\w+) is the first wrong stage", said.output, re.MULTILINE)
    assert stage in MISTAKES[fault]


def test_bisect_has_nothing_against_the_engine_itself() -> None:
    """Without a mistake all stages agree: what it says of the others is theirs."""
    said = invoke("bisect", "--engine", "numpy", "--model", str(FILE), *PROMPT)
    assert said.exit_code == 0, said.output
    assert "all 39 stages agree" in said.output


def test_its_features_are_those_of_gpt_oss() -> None:
    """By the description, of a file that prill did not write."""
    with open_gguf(FILE) as file:
        assert walks.features(describe(file)) == FEATURES
        assert {info.type.name for info in file.tensors.values()} == {"MXFP4", "BF16", "F32"}


def test_harmonys_marks_are_whole_and_end_what_they_end() -> None:
    """Each is one id, between words too; a return and a call end the generation, an end only a message."""
    with open_gguf(FILE) as file:
        tokenizer = load_tokenizer(file.metadata)
    marks = [tokenizer.vocabulary.ids[mark] for mark in HARMONY]
    for mark, token_id in zip(HARMONY, marks, strict=True):
        assert tokenizer.encode(f"a{mark}b") == [*tokenizer.encode("a"), token_id, *tokenizer.encode("b")]
        assert tokenizer.piece(token_id) == b""
        assert token_id not in tokenizer.encode(mark, parse_special=False)
        assert tokenizer.decode(tokenizer.encode(mark, parse_special=False)) == mark.encode()
    message = "<|start|>assistant<|channel|>analysis<|message|>Counting.<|end|>"
    assert [i for i in tokenizer.encode(message) if i in marks] == [
        tokenizer.vocabulary.ids[f"<|{name}|>"] for name in ("start", "channel", "message", "end")
    ]
    ends = {tokenizer.name(token_id) for token_id in tokenizer.eog_ids}
    assert ends == {"<|return|>", "<|call|>", "<|endoftext|>"}
    assert (tokenizer.name(tokenizer.bos_id or 0), tokenizer.add_bos) == ("<|startoftext|>", False)


@cache
def tokenizers() -> tuple[Tokenizer, Any]:
    """prill's, and tiktoken's with the file's tokens as ranks, o200k's published expression and the marks."""
    tiktoken = pytest.importorskip("tiktoken")
    with open_gguf(FILE) as file:
        ours = load_tokenizer(file.metadata)
    marks = {mark: ours.vocabulary.ids[mark] for mark in HARMONY}
    ranks = {ours.piece(i): i for i in range(ours.vocab_size) if i not in marks.values()}
    return ours, tiktoken.Encoding(
        "harmony", pat_str=PUBLISHED["gpt-4o"], mergeable_ranks=ranks, special_tokens=marks
    )


@pytest.mark.hf
@settings(deadline=None, max_examples=200)
@given(parts=st.lists(st.sampled_from(HARMONY) | ANY_TEXT, max_size=6))
@example(
    parts=["<|start|>", "user", "<|message|>", " It'S 12345 CamelCase//\n\n", "<|end|>", "<|start", "|>"]
)
def test_ids_are_those_of_tiktoken(parts: list[str]) -> None:
    """With marks wherever they stand, half of one too, and with marks that are only text."""
    (ours, theirs), text = tokenizers(), "".join(parts)
    assert ours.encode(text) == theirs.encode(text, allowed_special="all")
    assert ours.encode(text, parse_special=False) == theirs.encode_ordinary(text)
