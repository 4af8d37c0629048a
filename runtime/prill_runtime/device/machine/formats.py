"""How each block format of `quants` lies in device memory, and the header generated for the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from gguf import GGMLQuantizationType as T

from prill_runtime.quants.layouts import BlockFormat

HEADER: Final = "formats_table.cuh"
LOAD_BYTES: Final = 16  # bytes that a lane loads at a time
MOST_CHUNK_WEIGHTS: Final = 32  # weights of a chunk


@dataclass(frozen=True, slots=True)
class Format:
    """The layout of one type in device memory.

    Attributes:
        chunk: weights that a lane takes at a time. quants: bytes of a chunk's values, or of their low bits.
        high: bytes of a chunk's high bits.
        scales, per: bytes of scales for every `per` chunks. block: bytes of scales for every 256 weights.
    """

    chunk: int
    quants: int
    high: int
    scales: int
    per: int
    block: int

    @classmethod
    def of(cls, block: type[BlockFormat]) -> Format:
        """Divide a block's fields into streams.

        A chunk is one load of values, or 32 weights where that is less. A format with packed group scales
        (`s`) keeps two bytes of them for each chunk, and its own scales for each block of 256.
        """
        weights = block.weights
        fields: Mapping[str, Any] = block.layout.fields or {}

        def size(*names: str) -> int:
            return sum(fields[name][0].itemsize for name in names if name in fields)

        values, own = size("x", "q", "l"), size("d", "m", "dmin", "e")
        chunk = min(MOST_CHUNK_WEIGHTS, LOAD_BYTES * weights // values)
        grouped = "s" in fields
        return cls(
            chunk=chunk,
            quants=values * chunk // weights,
            high=size("h") * chunk // weights,
            scales=2 if grouped else own,
            per=1 if grouped else max(1, weights // chunk),
            block=own if grouped else 0,
        )


FORMATS: Final[dict[T, Format]] = {type: Format.of(block) for type, block in BlockFormat.registry.items()}
PLAIN: Final = tuple(type for type, block in BlockFormat.registry.items() if block.weights == 1)
# Suffixes of the kernels' names.
VALUES: Final = tuple(type.name.lower() for type in PLAIN)
BLOCKS: Final = tuple(type.name.lower() for type in FORMATS if type not in PLAIN)


def table() -> str:
    """Text of the header HEADER: for each format a struct NAME_Block of sizes and offsets, and KERNELS.

    N: weights of a chunk. WEIGHTS, BYTES, CHUNKS: of a block. Each field of the layout, in capitals: the byte
    of the block at which it begins.
    """
    lines = ["// Made of quants.py when the kernels are compiled (formats.py).", "#pragma once"]
    for type, format in FORMATS.items():
        block = BlockFormat.registry[type]
        numbers = {"N": format.chunk, "WEIGHTS": block.weights, "BYTES": block.layout.itemsize}
        if type not in PLAIN:
            numbers["CHUNKS"] = block.weights // format.chunk
            numbers |= {name.upper(): int(at) for name, (_, at, *_) in (block.layout.fields or {}).items()}
        constants = ", ".join(f"{name} = {number}" for name, number in numbers.items())
        lines.append(f"struct {type.name}_Block {{ static constexpr int {constants}; }};")
    for macro, types in (
        ("KERNELS_OF_VALUES", PLAIN),
        ("KERNELS_OF_BLOCKS", tuple(type for type in FORMATS if type not in PLAIN)),
    ):
        kernels = (
            f"    KERNEL(prefix##_{type.name.lower()}, Args, threads) {{ prefix<{type.name}>(a); }}"
            for type in types
        )
        lines += [" \\\n".join([f"#define {macro}(prefix, Args, threads)", *kernels])]
    return "\n".join(lines) + "\n"
