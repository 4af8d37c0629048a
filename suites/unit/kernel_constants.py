"""The kernels' sources go in; every number that divides their work, by file and name, comes out.

Read are `#define NAME number`, `constexpr int NAME = …` for every set of a template's numbers that is used,
those numbers themselves, and the threads of a KERNEL.
"""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import product

from prill_runtime.device.machine import compile as kernels
from prill_runtime.device.machine import formats

_DEFINE = re.compile(r"^#define (\w+) ([^\n]+?)(?: *//.*)?$", re.M)
_INCLUDE = re.compile(r'^#include "(sample|formats|fused|tensor_product)\.cuh"', re.M)
_CONSTEXPR = re.compile(r"\bconstexpr (?:int|size_t|unsigned) ([^;]+);")
_TEMPLATE = re.compile(r"^template <([^>]*)>\s+(?:static [\w\s]*?|struct )(\w+)(?:\(| \{)", re.M)
_USE = re.compile(r"\b(\w+)<([\w:, ]+)>")
_KERNEL = re.compile(r"^(?:CLUSTER_)?KERNEL\w*\(\w+, \w+, (\d+)[,)]", re.M)
CHUNKS = {format.chunk for format in formats.FORMATS.values()}  # weights of a chunk, `N` of the formats


def constants(file: str) -> dict[str, set[int]]:
    """Name -> values of one kernel file, with the header that is its own or that of the formats."""
    text = kernels.source(file)
    text += "".join(kernels.headers()[f"{name}.cuh"] for name in _INCLUDE.findall(text))
    found: dict[str, set[int]] = defaultdict(set)
    if "formats" in _INCLUDE.findall(text):
        found["N"] = set(CHUNKS)
    threads = {int(number) for number in _KERNEL.findall(text)}
    if threads:
        found["threads"] = threads
    for name, value in _DEFINE.findall(text):
        if re.fullmatch(r"[A-Z_]+", name):
            found[name] |= _values(value, found)
    for names, values in _template_numbers(text):
        for name, number in zip(names, values, strict=True):
            if number is not None:
                found[name].add(number)
    for body in _CONSTEXPR.findall(text):
        for piece in re.split(r",\s*(?=\w+ = )", body):
            name, _, expression = piece.partition(" = ")
            found[name.strip()] |= _values(expression, found)
    return dict(found)


def _template_numbers(text: str) -> list[tuple[list[str], list[int | None]]]:
    """Parameters and arguments of every use of a template of the file with numbers."""
    parameters = {
        name: [each.split()[-1] for each in inside.split(",")] for inside, name in _TEMPLATE.findall(text)
    }
    uses = []
    for name, inside in _USE.findall(text):
        arguments = [each.strip() for each in inside.split(",")]
        if len(arguments) == len(parameters.get(name, ())):
            uses.append((parameters[name], [int(each) if each.isdecimal() else None for each in arguments]))
    return uses


def _values(expression: str, known: dict[str, set[int]]) -> set[int]:
    """All values of an expression, its names taking every value they have."""
    text = expression.replace("Format::N", "N")
    names = sorted(set(re.findall(r"\b[A-Za-z_]\w*", text)))
    choices = [sorted(CHUNKS if name == "N" else known.get(name, ())) for name in names]
    values = (_evaluated(text, dict(zip(names, some, strict=True))) for some in product(*choices))
    return {value for value in values if value is not None}


def _evaluated(expression: str, names: dict[str, int]) -> int | None:
    """A C expression of whole numbers; None where it is something else."""
    text = re.sub(r"(.+)\?(.+):(.+)", r"(\2) if (\1) else (\3)", expression).replace("/", "//")
    if not re.fullmatch(r"[\w\s()+*/<>=-]*", text):
        return None
    try:
        value = eval(text, {"__builtins__": {}}, names)
    except (NameError, SyntaxError, TypeError):
        return None
    return value if type(value) is int else None
