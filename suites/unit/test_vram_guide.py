"""The guide's formulas against published sizes, real files and the ledger; a wrong ledger is noticed.

Its commands are run with those of every other page (test_docs.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_fixtures.synth import SHAPES
from prill_harness.engines.models import resolve_model
from prill_harness.faults.opening import open_engine
from prill_harness.measure.vram import MOMENTS, SESSIONS, account, position_bytes
from prill_runtime.device.memory.arena import PURPOSES, OutOfDeviceMemory, Region, padded
from prill_runtime.errors import Inconclusive
from prill_runtime.gguf.file import open_gguf

from .commandline import emitted, invoke

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "VRAM_DEBUGGING_GUIDE.md").read_text("utf-8")


@dataclass(frozen=True)
class Sizes:
    """A published model's configuration, and the size its files are said to have."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    biases: bool = False
    published: str = ""

    @property
    def values(self) -> int:
        """Every value of the model, tensor by tensor."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = 2 * self.width * q + 2 * self.width * kv + 3 * self.width * self.ffn + 2 * self.width
        layer += (q + 2 * kv) * self.biases
        return self.vocab * self.width * (2 - self.tied) + self.layers * layer + self.width


def of_shape(name: str) -> Sizes:
    s = SHAPES[name]
    return Sizes(s.layers, s.width, s.heads, s.kv_heads, s.head_dim, s.ffn, s.vocab, s.tied)


MODELS = {
    "Qwen2.5-0.5B": Sizes(24, 896, 14, 2, 64, 4864, 151_936, True, biases=True, published="988 MB"),
    "Llama-3.2-1B": of_shape("llama-1b"),
    "Phi-3-mini": Sizes(32, 3072, 32, 32, 96, 8192, 32_064, False, published="7.64 GB"),
    "Llama-3.1-8B": of_shape("llama-8b"),
}


def table(*head: str) -> list[list[str]]:
    """The rows of the guide's table that begins with these columns."""
    start = GUIDE.index("| " + " | ".join(head))
    rows = re.match(r"(?:\|.*\n)+", GUIDE[start:])
    assert rows
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows[0].splitlines()[2:]]


def test_the_table_of_models_is_the_formulas() -> None:
    """Values, 16 bits, a position, 4096 positions: every figure of every row."""
    rows = {name: [int(c.replace(",", "")) for c in cells] for name, *cells in table("model", "values")}
    assert set(rows) == set(MODELS)
    for name, model in MODELS.items():
        each = position_bytes(
            {"n_layers": model.layers, "n_kv_heads": model.kv_heads, "head_dim": model.head_dim}
        )
        assert rows[name] == [model.values, 2 * model.values, each, 4096 * each], name


def test_the_formula_gives_what_is_published() -> None:
    """The files that people download are as large as the formula says: neither 356 MB nor 2.6 GB."""
    told = {name: model for name, model in MODELS.items() if model.published}
    assert len(told) == 2
    for model in told.values():
        nbytes = 2 * model.values
        assert model.published in (f"{nbytes / 1e6:.0f} MB", f"{nbytes / 1e9:.2f} GB")
        assert model.published in GUIDE


def test_the_table_of_types_is_the_formats() -> None:
    """Values and bytes of a block, by the reference implementation of the formats."""
    rows = table("type", "values of a block")
    assert len(rows) >= 7
    for name, values, nbytes in rows:
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (int(values), int(nbytes))


@pytest.mark.parametrize("kind", ["f16", "f32", "q8_0", "q4_0", "q4_k", "q6_k"])
def test_a_packaged_file_has_the_bytes_of_the_formula(kind: str) -> None:
    """Tensor by tensor, by the guide's own table; and as many values as the configuration says."""
    block = {name: (int(values), int(nbytes)) for name, values, nbytes in table("type", "values of a block")}
    with open_gguf(resolve_model(f"fixture:llama-tiny:{kind}")) as file:
        held = 0
        for tensor in file.tensors.values():
            values, nbytes = block[tensor.type.name]
            count = 1
            for size in tensor.shape:
                count *= size
            assert tensor.nbytes == count // values * nbytes
            held += count
    assert held == Sizes(4, 256, 4, 2, 64, 512, 1024, False).values


@pytest.mark.parametrize(("kind", "most"), [("f16", 1.0), ("q4_k", 1.03)])
def test_the_ledger_has_the_bytes_of_the_formula(kind: str, most: float) -> None:
    """On the emulator: weights as many bytes as the file's tensors, a few percent more where blocks are
    repacked; sessions exactly by the formula; and back at idle."""
    model = f"fixture:llama-tiny:{kind}"
    with open_gguf(resolve_model(model)) as file:
        nbytes = sum(tensor.nbytes for tensor in file.tensors.values())
    with open_engine("emu:cache=256", model) as engine:
        found = account(engine, nbytes)
    assert found.wrong == ()
    assert nbytes <= found.held["loaded"]["weights"] <= most * nbytes
    formula = 2 * 4 * 2 * 64 * 4
    assert found.position_bytes == formula
    assert found.held["in use"]["cache"] == SESSIONS * found.positions * formula
    assert found.held["after"] == found.held["idle"]
    assert 0 < found.gap < found.free


def test_an_engine_without_a_ledger_is_not_called_right() -> None:
    """Nothing was observed: exit 10 and a sentence."""
    with open_engine("numpy", "fixture:llama-tiny") as engine, pytest.raises(Inconclusive, match="no ledger"):
        account(engine, 1)
    result = invoke("vram", "--engine", "numpy", "--model", "fixture:llama-tiny")
    assert (result.exit_code, result.stdout) == (10, "")


def test_the_account_is_one_json_document() -> None:
    """For machines: every figure of the table, in bytes."""
    result = invoke("vram", "--engine", "emu:cache=64", "--model", "fixture:llama-tiny", "--json")
    assert result.exit_code == 0, result.stderr
    found = emitted(result.stdout)
    assert set(found["held"]) == set(MOMENTS)
    assert set(found["planned"]) == set(PURPOSES)
    assert found["wrong"] == []


@given(
    st.sampled_from(["weights lost", "beyond plan", "kept", "cache"]), st.sampled_from(PURPOSES), st.data()
)
def test_whatever_is_wrong_is_said(what: str, purpose: str, data: st.DataObject) -> None:
    """A ledger that is off by any number of bytes, in any purpose, at any moment, is never called right."""
    from prill_harness.measure.vram import _wrong

    planned = dict.fromkeys(PURPOSES, 10_000)
    moment = dict.fromkeys(PURPOSES, 100)
    held = {name: dict(moment) for name in MOMENTS}
    held["in use"]["cache"] = 100 + 64
    assert _wrong(planned, held, 64, 100) == ()
    amount = data.draw(st.integers(1, 99))
    if what == "weights lost":
        assert _wrong(planned, held, 64, 100 + amount)
    elif what == "beyond plan":
        assert _wrong(planned | {purpose: 100 - amount}, held, 64, 100)
    elif what == "kept":
        held["after"][purpose] += data.draw(st.sampled_from([amount, -amount]))
        assert _wrong(planned, held, 64, 100)
    else:
        held["in use"]["cache"] += data.draw(st.sampled_from([amount, -amount]))
        assert _wrong(planned, held, 64, 100)


def test_pieces_are_joined_when_neighbours_are_given_back() -> None:
    """What the guide says of fragments: every second of eight is free, and not in one piece; then all is."""
    region = Region("cache", 0, 8 * 1024)
    blocks = [region.alloc(512) for _ in range(8)]
    for block in blocks[::2]:
        region.free(block)
    free = region.size - sum(padded(512) for _ in blocks[1::2])
    assert region.gap == region.size - 8 * padded(512) < free
    with pytest.raises(OutOfDeviceMemory, match="do not fit"):
        region.alloc(free - padded(0))
    for block in blocks[1::2]:
        region.free(block)
    assert region.gap == region.size
