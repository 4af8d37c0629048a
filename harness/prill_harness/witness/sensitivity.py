"""Variations of a model file with one thing changed, for oracle and witness alike.

A value whose change has no effect was not read. So each variation is read twice, by the oracle through the
runtime and by the witness through `gguf`: both must change, and to the same logits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from prill_harness.numbers.compare import largest
from prill_harness.planting import faults
from prill_harness.witness.reading import Reading
from prill_runtime.gguf.file import GGUFFile, open_gguf
from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.models import registry
from prill_runtime.models.cache import KVCache
from prill_runtime.models.keys import Keys
from prill_runtime.models.load import load
from prill_runtime.ops.numpy import NumpyBackend
from prill_runtime.run.model import Model

FIRST_LAYERS = 2  # of a deep model: the variations are looked at on its first layers
LARGEST_TABLE = 1 << 26  # values of an embedding table of which a changed copy is made
PROJECTION = re.compile(r"blk\.0\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight$")
SINKS = "blk.0.attn_sinks.weight"
TABLE, HEAD, FREQUENCIES = "token_embd.weight", "output.weight", "rope_freqs.weight"
LONG_FACTORS = "rope_factors_long.weight"


class Varied:
    """An open file with some metadata and tensors replaced, as far as loading a model needs it.

    Args:
        keys: full metadata name -> value. tensors: name -> values (float64), None removes the tensor.
    """

    def __init__(self, file: GGUFFile, keys: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        self.path, self.architecture = file.path, file.architecture
        self.metadata = MappingProxyType({**file.metadata, **keys})
        self._file, self._changed, self.place = file, tensors, file.place
        layers = int(self.metadata[f"{self.architecture}.block_count"])
        kept: dict[str, TensorInfo] = {
            name: info for name, info in file.tensors.items() if _layer(name) < layers
        }
        for name, values in tensors.items():
            if values is None:
                kept.pop(name, None)
            else:
                kept[name] = TensorInfo(name, values.shape, GGMLQuantizationType.F32)
        self.tensors = MappingProxyType(kept)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, (nbytes,)."""
        values = self._changed.get(name)
        if values is None:
            return self._file.raw(name)
        return np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def oracle_logits(path: Path, reading: Reading, ids: Sequence[int]) -> NDArray[np.float64]:
    """Logits of the oracle's code in float64 from the file as `reading` has it: (len(ids), vocabulary).

    Faults of the engine are suspended, as they are in an oracle that is opened.

    Raises:
        ModelFileError, UnsupportedModel: the runtime refuses the changed file.
    """
    with faults.only(()), open_gguf(path) as file:
        prefix = f"{file.architecture}."
        stated = {name: value for name, value in reading.keys.items() if name.startswith(prefix)}
        varied: Any = Varied(file, stated, reading.changed)
        backend = NumpyBackend("float64")
        wired, report = load(varied, backend)
        model = Model(wired, backend, None, report, "")  # type: ignore[arg-type]  # ids go in, no text
        cache = KVCache(*wired.network.cache_shape, len(ids), backend.dtype, 0)
        return np.asarray(model.forward([(cache, ids)])[0], np.float64)


@dataclass(frozen=True)
class Variation:
    """One change to a file: its name, and the changed file."""

    name: str
    reading: Reading


def shallow(reading: Reading) -> Reading:
    """The same model with only its first layers."""
    return reading.with_keys(block_count=min(FIRST_LAYERS, int(reading.key("block_count"))))


def asked(reading: Reading) -> frozenset[str]:
    """The keys, without their prefix, and the optional tensors that the architecture's description asks for.

    Raises:
        ModelFileError, UnsupportedModel: it refuses the file's keys.
    """
    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in reading.tensors.items()}
    tensors = {name: TensorInfo(name, shape, GGMLQuantizationType.F32) for name, shape in shapes.items()}
    keys = Keys(reading.architecture, reading.keys, tensors)
    registry.load(reading.architecture)(keys)
    return keys.asked


def variations(reading: Reading, length: int) -> Iterator[Variation]:
    """Every change that leaves a valid model; `length`: ids of the prompt on which it must show.

    What the file leaves open is varied too, where the description asks for it.
    """
    names = asked(reading)
    kind = "rms_" if reading.key("attention.layer_norm_rms_epsilon") is not None else ""
    eps = float(reading.key(f"attention.layer_norm_{kind}epsilon"))
    yield Variation(
        "eps", reading.with_keys(**{f"attention__layer_norm_{kind}epsilon": largest(64 * eps, 0.01)})
    )
    yield from _heads(reading)
    if "rope.freq_base" in names:
        base = float(reading.key("rope.freq_base", 10000.0))
        yield Variation("rope base", reading.with_keys(rope__freq_base=base / 16))
        yield from _rotation(reading, names)
    if "attention.sliding_window" in names:
        yield Variation("window", reading.with_keys(attention__sliding_window=max(1, length // 3)))
    yield from _told(reading)
    yield from _tie(reading)
    for name in reading.tensors:
        if name.endswith((".bias", "_norm.weight")) and _layer(name) < 1:
            yield Variation(name, reading.with_tensor(name, _moved(reading.all(name))))
        biased = name.removesuffix("weight") + "bias"
        if biased in names and PROJECTION.match(name) and not reading.has(biased):
            zero = np.zeros(reading.count(name))
            yield Variation(biased, reading.with_tensor(biased, _moved(zero)))


def _heads(reading: Reading) -> Iterator[Variation]:
    """Half as many heads of twice the size; the matrices keep their shapes."""
    heads, groups = int(reading.key("attention.head_count")), reading.groups
    if any(reading.has(f"blk.0.{name}.weight") for name in ("attn_q_norm", "attn_sinks")):
        return  # one value for each head, or each component of it
    if heads % 2 == 0 and groups % 2 == 0:
        doubled = {f"attention__{part}_length": 2 * reading.head_size for part in ("key", "value")}
        half = {"attention__head_count": heads // 2, "attention__head_count_kv": groups // 2}
        told = reading.key("rope.dimension_count") is not None or reading.has(FREQUENCIES)
        rope = {"rope__dimension_count": reading.rope_size} if told else {}
        yield Variation("head count", reading.with_keys(**half, **doubled, **rope))


def _rotation(reading: Reading, names: frozenset[str]) -> Iterator[Variation]:
    """Another scaling, other divisors, fewer rotated components."""
    size, told = reading.rope_size, reading.key("rope.scaling.type", "none")
    if reading.has(LONG_FACTORS):
        return  # they fix both
    if "rope.scaling.factor" in names:
        factor = 4 * float(reading.key("rope.scaling.factor", 1.0))
        scaled = {
            "rope__scaling__type": "linear" if told == "none" else told,
            "rope__scaling__factor": factor,
        }
        yield Variation("rope scaling factor", reading.with_keys(**scaled))
    if FREQUENCIES not in names:
        return
    old = reading.all(FREQUENCIES) if reading.has(FREQUENCIES) else np.ones(size // 2)
    if size >= 4:
        fewer = reading.with_keys(rope__dimension_count=size // 4 * 2)
        if reading.has(FREQUENCIES):  # one divisor for each pair
            fewer = fewer.with_tensor(FREQUENCIES, old[: size // 4])
        yield Variation("rope dimension", fewer)
    steps = np.exp2(np.arange(size // 2) % 3 - 1)
    yield Variation(FREQUENCIES, reading.with_tensor(FREQUENCIES, old * steps))


def _told(reading: Reading) -> Iterator[Variation]:
    """Another value of whatever the file has that not every architecture reads."""
    others: dict[str, Callable[[Any], Any]] = {
        "rope.freq_base_swa": lambda base: base / 16,
        "rope.scaling.attn_factor": lambda factor: 2 * factor,
        "attention.temperature_scale": lambda beta: 8 * beta,
        "attn_logit_softcapping": lambda cap: cap / 8,
        "final_logit_softcapping": lambda cap: cap / 8,
        "expert_used_count": lambda count: max(1, count - 1),
        "use_parallel_residual": lambda parallel: not parallel,
    }
    for name, other in others.items():
        value = reading.key(name)
        if value is not None and other(value) != value:
            yield Variation(name, reading.with_keys(**{name.replace(".", "__"): other(value)}))
    if reading.has(SINKS):
        yield Variation(SINKS, reading.with_tensor(SINKS, _moved(reading.all(SINKS))))


def _tie(reading: Reading) -> Iterator[Variation]:
    """A head of its own for a tied model; the embedding table for a model with a head."""
    if reading.count(TABLE) * int(reading.key("embedding_length")) <= LARGEST_TABLE:
        own = None if reading.has(HEAD) else reading.all(TABLE)[::-1]
        yield Variation("tie", reading.with_tensor(HEAD, own))


def _moved(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Changed values that float32 can hold; not just a shift, which a norm would remove."""
    wave = np.cos(np.arange(values.size)).reshape(values.shape) * largest(float(np.abs(values).max()), 1.0)
    return np.asarray((values + wave).astype(np.float32), np.float64)
