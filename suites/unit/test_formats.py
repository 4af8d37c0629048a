"""A block format is written down once, in quants.py: what the kernels know of it is made of that."""

from __future__ import annotations

import re

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

from prill_runtime.device.machine import compile as kernels
from prill_runtime.device.machine import formats
from prill_runtime.quants.layouts import BlockFormat, Fields

FORMAT = re.compile(r"^struct (\w+) : (\w+)_Block \{", re.M)
REPACKED = re.compile(
    r"^KERNEL\(repack_(\w+), [^<\n]*(?:<(\w+)_Block>.*)?\n(?:    using B = (\w+)_Block;)?", re.M
)
# Weights of a chunk; bytes of its values, high bits and scales; chunks that share those; scales of 256.
STREAMS = {
    T.F32: (4, 16, 0, 0, 1, 0), T.F16: (8, 16, 0, 0, 1, 0), T.BF16: (8, 16, 0, 0, 1, 0),
    T.Q8_0: (16, 16, 0, 2, 2, 0), T.Q4_0: (32, 16, 0, 2, 1, 0), T.Q4_1: (32, 16, 0, 4, 1, 0),
    T.Q5_0: (32, 16, 4, 2, 1, 0), T.Q5_1: (32, 16, 4, 4, 1, 0), T.Q2_K: (32, 8, 0, 2, 1, 4),
    T.Q3_K: (32, 8, 4, 2, 1, 2), T.Q4_K: (32, 16, 0, 2, 1, 4), T.Q5_K: (32, 16, 4, 2, 1, 4),
    T.Q6_K: (32, 16, 8, 2, 1, 2), T.MXFP4: (32, 16, 0, 1, 1, 0),
    T.IQ4_NL: (32, 16, 0, 2, 1, 0), T.IQ4_XS: (32, 16, 0, 2, 1, 2),
}  # fmt: skip


def differences(sources: dict[str, str], repack: str) -> set[str]:
    """Formats that are in one place and not in another, each with the place that lacks it."""
    wanted = {type.name for type in BlockFormat.registry}
    plain = {type.name for type in formats.PLAIN}
    structs = dict(match.groups() for text in sources.values() for match in FORMAT.finditer(text))
    repacked = {name.upper(): a or b for name, a, b in REPACKED.findall(repack) if name != "plain"}
    found = {f"{name}: struct" for name in wanted ^ set(structs)}
    bases = [*structs.items(), *repacked.items()]
    found |= {f"{name}: another block" for name, base in bases if name != base}
    found |= {f"{name}: repacking" for name in (wanted - plain) ^ set(repacked)}
    return found | {f"{type.name}: streams" for type in set(STREAMS) ^ set(formats.FORMATS)}


def test_quants_and_kernels_know_the_same_formats() -> None:
    """Every format that quants.py decodes has a struct and a repacking kernel of its own block."""
    assert not differences(kernels.headers(), kernels.source("repack"))


@pytest.mark.parametrize(
    ("old", "new", "missing"),
    [
        ("struct Q4_0 : Q4_0_Block", "struct Q4_9 : Q4_9_Block", {"Q4_0: struct", "Q4_9: struct"}),
        ("struct Q4_0 : Q4_0_Block", "struct Q4_0 : Q4_1_Block", {"Q4_0: another block"}),
        ("KERNEL(repack_q4_0,", "KERNEL(repack_q4_1,", {"Q4_0: repacking"}),
        ("<Q4_0_Block>", "<Q4_1_Block>", {"Q4_0: another block"}),
        ("using B = Q4_1_Block", "using B = Q5_1_Block", {"Q4_1: another block"}),
    ],
)  # fmt: skip
def test_a_format_in_one_place_alone_is_seen(old: str, new: str, missing: set[str]) -> None:
    """The comparison above is no formality: a format that a kernel file lacks, or has too much, is named."""
    headers = {name: text.replace(old, new) for name, text in kernels.headers().items()}
    assert differences(headers, kernels.source("repack").replace(old, new)) == missing


def test_a_new_format_is_missed_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format that somebody adds to quants.py alone is missed in the kernels."""
    monkeypatch.setattr(BlockFormat, "registry", dict(BlockFormat.registry))

    class Ternary(BlockFormat, type=T.TQ2_0, layout=[("q", "u1", 64), ("d", "<f2")]):
        """Two bits of 256 weights, as TQ2_0 has them."""

        @staticmethod
        def decode(b: Fields) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            raise NotImplementedError

    lacking = {"TQ2_0: struct", "TQ2_0: repacking"}
    assert differences(kernels.headers(), kernels.source("repack")) == lacking
    assert formats.Format.of(Ternary) == formats.Format(32, 8, 0, 2, 8, 0)


@pytest.mark.parametrize("type", STREAMS, ids=lambda type: type.name)
def test_streams_follow_from_the_fields(type: T) -> None:
    """What a format takes in device memory, worked out by hand from ggml-common.h."""
    assert formats.FORMATS[type] == formats.Format(*STREAMS[type])


@pytest.mark.parametrize("type", STREAMS, ids=lambda type: type.name)
def test_the_table_holds_the_layout(type: T) -> None:
    """Sizes as gguf has them; every field of a block begins where the kernels' table says."""
    (line,) = re.findall(rf"^struct {type.name}_Block .*", formats.table(), re.M)
    numbers = {name: int(number) for name, number in re.findall(r"(\w+) = (\d+)", line)}
    assert (numbers.pop("WEIGHTS"), numbers.pop("BYTES")) == GGML_QUANT_SIZES[type]
    assert numbers.pop("N") == STREAMS[type][0]
    if type not in formats.PLAIN:
        assert numbers.pop("CHUNKS") * STREAMS[type][0] == GGML_QUANT_SIZES[type][0]
        ends = {name.lower(): at for name, at in numbers.items()}
        assert ends == {
            name: at for name, (_, at, *_) in (BlockFormat.registry[type].layout.fields or {}).items()
        }


def test_every_format_has_a_kernel_of_each_family() -> None:
    """One macro of the table stands for the kernels of all formats."""
    assert set(kernels.signatures("matvec")) == {
        f"matvec_{type.name.lower()}" for type in BlockFormat.registry
    }
