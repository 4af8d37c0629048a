"""Load a checked file onto a backend, as a model ready for its forward pass; every tensor must be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from prill_runtime.errors import ModelFileError, PrillError, UnsupportedModel
from prill_runtime.gguf.kinds import require_model
from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.models import registry, walks
from prill_runtime.models.base import Pass, Step, Tap, Tensor, untouched
from prill_runtime.models.keys import Keys
from prill_runtime.models.nodes.network import Network
from prill_runtime.ops.protocol import Array, Backend
from prill_runtime.quants.layouts import supported_types

NAMED = 5  # tensors listed in a sentence
HINT = "docs/ADAPTER_PATTERN_GUIDE.md adds one"


class Described(Protocol):
    """What a description asks of a file: GGUFFile has it."""

    @property
    def path(self) -> Path: ...
    @property
    def architecture(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading a file found.

    Attributes:
        tensors: how many were read. parameters: their elements. nbytes: bytes of the weights in memory.
        tied_head: the file has no output matrix of its own.
        zero_tensors: matrices with nothing but zeros, which usually were never written.
    """

    tensors: int
    parameters: int
    nbytes: int
    tied_head: bool
    zero_tensors: tuple[str, ...]


@dataclass(frozen=True)
class Wired:
    """A model's nodes and, by the names they ask for, its weights as a backend holds them."""

    network: Network
    weights: dict[str, Array]

    def passing(self, ops: Backend, step: Step, tap: Tap = untouched) -> Pass:
        """What the nodes compute a step in."""
        return Pass(self.network, self.weights, ops, step, tap)


def describe(file: Described) -> Network:
    """The model that a file's metadata and tensor names make, without a look at shapes or types.

    Raises:
        ModelFileError: a value that is missing or wrong.
        UnsupportedModel: one that nothing here implements, a key that nothing reads and that may change the
            result, or an architecture that nobody described.
        DescriptionError: an installed description that is broken, or a second one.
    """
    described = registry.names()
    if file.architecture not in described:
        raise UnsupportedModel(
            "unknown architecture",
            where=f"{file.path}, general.architecture",
            expected=" or ".join(described),
            got=repr(file.architecture),
            hint=HINT,
        )
    keys = Keys(file.architecture, file.metadata, file.tensors)
    try:
        network = registry.load(file.architecture)(keys)
        keys.require_all_read()
        _ = network.cache_shape  # refuses layers that no one cache has room for
    except PrillError as error:
        error.where = error.where or str(file.path)
        raise
    return network


def examine(file: Any) -> tuple[Network, tuple[str, ...]]:
    """Everything that can be wrong with a file, without a byte of its weights.

    Returns:
        The model, and the tensors to load in the order it needs them.

    Raises:
        ModelFileError, UnsupportedModel: as `load`.
    """
    require_model(file)
    network = describe(file)
    return network, check_tensors(str(file.path), file.tensors, walks.tensors(network))


def load(file: Any, ops: Backend) -> tuple[Wired, LoadReport]:
    """Check and read a whole file.

    Raises:
        ModelFileError: metadata or tensors that are missing, superfluous or of the wrong shape.
        UnsupportedModel: something sound that is not implemented, part of a model, or no model.
    """
    network, names = examine(file)
    weights = {name: ops.weight(file.raw(name), file.tensors[name]) for name in names}
    report = LoadReport(
        tensors=len(weights),
        parameters=sum(weight.size for weight in weights.values()),
        nbytes=sum(weight.nbytes for weight in weights.values()),
        tied_head=network.head.tied,
        zero_tensors=tuple(name for name, w in weights.items() if w.ndim == 2 and ops.is_zero(w)),
    )
    return Wired(network, weights), report


def check_tensors(
    where: str, found: Mapping[str, TensorInfo], wanted: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """The names to load, in the order the pass needs them, once found and wanted agree.

    Raises:
        ModelFileError: a tensor that is missing, that nothing reads, or of another shape.
        UnsupportedModel: a tensor of a type without decoder.
    """
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ModelFileError(
            f"{len(missing)} tensors are missing", where=where, expected=_some(missing), got="no such tensor"
        )
    unused = sorted(set(found) - set(wanted))
    if unused:
        raise ModelFileError(
            f"{len(unused)} tensors would not be used",
            where=where,
            expected="only tensors that the architecture reads",
            got=_some(unused),
        )
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise ModelFileError(
                "wrong tensor shape", where=name, expected=tensor.shape, got=found[name].shape
            )
        if found[name].type not in supported_types():
            raise UnsupportedModel(
                f"the type of tensor {name} is not implemented",
                where=where,
                expected=f"one of {', '.join(known.name for known in supported_types())}",
                got=found[name].type.name,
            )
    return tuple(wanted)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
