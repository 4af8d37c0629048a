"""A checked file and a backend go in, a model ready for its forward pass comes out; every tensor is used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from prill_runtime.errors import ModelFileError, UnsupportedModel
from prill_runtime.gguf.file import GGUFFile
from prill_runtime.gguf.kinds import require_model
from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.models.cache import KVCache
from prill_runtime.models.config import Config, Keys
from prill_runtime.ops.protocol import Array, Backend, Ids
from prill_runtime.quants.layouts import supported_types

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
NAMED = 5  # tensors listed in a sentence

# Sees every named stage and returns what the pass goes on with.
Tap = Callable[[str, Array], Array]


def untouched(stage: str, x: Array) -> Array:
    """The tap that changes nothing."""
    return x


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that an architecture reads."""

    name: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading a file found.

    Attributes:
        tensors: how many were read. parameters: their elements. nbytes: bytes of the weights in memory.
        tied_head: the file has no output matrix of its own.
        zero_tensors: matrices with nothing but zeros, which usually were never written.
        unknown_keys: metadata under the architecture's prefix that the forward pass does not read.
    """

    tensors: int
    parameters: int
    nbytes: int
    tied_head: bool
    zero_tensors: tuple[str, ...]
    unknown_keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One forward step: the new rows of every sequence, one below the other.

    Attributes:
        ids, positions: (row,). sequences: each cache and its rows.
    """

    ids: Ids
    positions: Ids
    sequences: tuple[tuple[KVCache, slice], ...]


class Adapter(ABC):
    """One architecture, registered by declaration: `class Llama(Adapter, arch="llama")`."""

    registry: ClassVar[dict[str, type[Adapter]]] = {}

    def __init_subclass__(cls, arch: str) -> None:
        Adapter.registry[arch] = cls

    def __init__(self, config: Config, weights: Mapping[str, Array]) -> None:
        self.config = config
        self.weights = weights
        self.blocks = [  # the weights of each layer, by their name inside the layer
            {name.removeprefix(at): weight for name, weight in weights.items() if name.startswith(at)}
            for at in (f"blk.{layer}." for layer in range(config.n_layers))
        ]

    @classmethod
    @abstractmethod
    def configure(cls, keys: Keys, vocab_size: int, tied_head: bool) -> Config:
        """Read the metadata.

        Raises:
            ModelFileError, UnsupportedModel: a value that is missing, wrong or not implemented.
        """

    @staticmethod
    @abstractmethod
    def layout(config: Config) -> list[TensorSpec]:
        """Every tensor that a file of this configuration may hold, the head and the embedding included."""

    @abstractmethod
    def forward(self, ops: Backend, step: Step, tap: Tap) -> Array:
        """Hidden states after the last norm (row, width); keys and values go to the caches, uncommitted."""

    def head(self, ops: Backend, hidden: Array, tap: Tap) -> Array:
        """Logits (row, vocab) from hidden states after the last norm."""
        return tap("logits", ops.linear(hidden, self.head_weight))

    @property
    def rotation(self) -> dict[str, Any]:
        """What `Backend.rope` takes of this model, the layout left out; empty where nothing is rotated."""
        return {}

    @property
    def head_weight(self) -> Array:
        """The matrix (vocab, width) of the logits."""
        return self.weights[EMBEDDING if self.config.tied_head else HEAD]

    def attend(self, ops: Backend, step: Step, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Append k, v (row, kv_head, dim) to each sequence's cache and attend with q (row, head, dim)."""
        mixed = []
        for cache, rows in step.sequences:
            cache.append(layer, k[rows], v[rows])
            keys, values = cache.view(layer)
            mixed.append(
                ops.attention(
                    q[rows],
                    keys,
                    values,
                    start=cache.length,
                    scale=self.config.head_dim**-0.5,
                    window=self.config.window,
                )
            )
        return mixed[0] if len(mixed) == 1 else ops.concatenate(mixed)

    @classmethod
    def read_config(cls, file: GGUFFile) -> tuple[Config, Keys]:
        """The configuration, from metadata and the embedding table's shape, and the keys it was read from.

        Raises:
            ModelFileError, UnsupportedModel: as `load`.
        """
        embedding = file.tensors.get(EMBEDDING)
        if embedding is None or len(embedding.shape) != 2:
            got = "no such tensor" if embedding is None else f"shape {embedding.shape}"
            raise ModelFileError(
                "no embedding table", where=str(file.path), expected=f"{EMBEDDING} (vocab, width)", got=got
            )
        keys = Keys(file.architecture, file.metadata)
        tied = HEAD not in file.tensors
        config = cls.configure(keys, embedding.shape[0], tied)
        stated = keys.integer("vocab_size", default=config.vocab_size)
        if stated != config.vocab_size:
            raise ModelFileError(
                "vocabulary and embedding table differ",
                where=f"{keys.prefix}vocab_size",
                expected=f"{config.vocab_size}, the rows of {EMBEDDING}",
                got=stated,
            )
        if config.n_layers > len(file.tensors):  # every block has tensors; a table of a million is not made
            raise ModelFileError(
                "more blocks than tensors",
                where=f"{keys.prefix}block_count",
                expected=f"at most {len(file.tensors)}, the tensors of the file",
                got=config.n_layers,
            )
        return config, keys

    @classmethod
    def examine(cls, file: GGUFFile) -> tuple[Config, Keys, tuple[str, ...]]:
        """Everything that can be wrong with a file, without a byte of its weights.

        Returns:
            The configuration, the keys it was read from, and the tensors to load.

        Raises:
            ModelFileError, UnsupportedModel: as `load`.
        """
        config, keys = cls.read_config(file)
        names = check_tensors(str(file.path), file.tensors, cls.layout(config))
        return config, keys, names

    @classmethod
    def load(cls, file: GGUFFile, ops: Backend) -> tuple[Self, LoadReport]:
        """Check and read a whole file of this architecture.

        Raises:
            ModelFileError: metadata or tensors that are missing, superfluous or of the wrong shape.
            UnsupportedModel: something sound that the architecture's forward pass does not implement.
        """
        config, keys, names = cls.examine(file)
        weights = {name: ops.weight(file.raw(name), file.tensors[name]) for name in names}
        report = LoadReport(
            tensors=len(weights),
            parameters=sum(weight.size for weight in weights.values()),
            nbytes=sum(weight.nbytes for weight in weights.values()),
            tied_head=config.tied_head,
            zero_tensors=tuple(name for name, w in weights.items() if w.ndim == 2 and ops.is_zero(w)),
            unknown_keys=keys.unread(),
        )
        return cls(config, weights), report


def check_tensors(
    where: str, found: Mapping[str, TensorInfo], wanted: Sequence[TensorSpec]
) -> tuple[str, ...]:
    """The names to load, in the order the pass needs them, once found and wanted agree.

    Raises:
        ModelFileError: a tensor that is missing, that nothing reads, or of another shape.
        UnsupportedModel: a tensor of a type without decoder.
    """
    specs = {spec.name: spec for spec in wanted}
    missing = [name for name, spec in specs.items() if not spec.optional and name not in found]
    if missing:
        raise ModelFileError(
            f"{len(missing)} tensors are missing", where=where, expected=_some(missing), got="no such tensor"
        )
    unused = sorted(set(found) - set(specs))
    if unused:
        raise ModelFileError(
            f"{len(unused)} tensors would not be used",
            where=where,
            expected="only tensors that the architecture reads",
            got=_some(unused),
        )
    names = tuple(name for name in specs if name in found)
    for name in names:
        if found[name].shape != specs[name].shape:
            raise ModelFileError(
                "wrong tensor shape", where=name, expected=specs[name].shape, got=found[name].shape
            )
        if found[name].type not in supported_types():
            raise UnsupportedModel(
                f"the type of tensor {name} is not implemented",
                where=where,
                expected=f"one of {', '.join(known.name for known in supported_types())}",
                got=found[name].type.name,
            )
    return names


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def adapter_of(file: GGUFFile) -> type[Adapter]:
    """The adapter of a file that holds a model.

    Raises:
        UnsupportedModel: it holds something else, part of a model, or one of an unknown architecture.
    """
    require_model(file)
    try:
        return adapter_for(file.architecture)
    except UnsupportedModel as error:
        error.where = f"{file.path}, {error.where}"
        raise


def adapter_for(architecture: str) -> type[Adapter]:
    """The adapter that a file's `general.architecture` names.

    Raises:
        UnsupportedModel: nobody declared it.
    """
    if architecture not in Adapter.registry:
        raise UnsupportedModel(
            "unknown architecture",
            where="general.architecture",
            expected=" or ".join(sorted(Adapter.registry)),
            got=repr(architecture),
        )
    return Adapter.registry[architecture]


def dense(keys: Keys) -> None:
    """Make sure that a model has no experts.

    Raises:
        UnsupportedModel: it has.
    """
    experts = keys.integer("expert_count", default=0, least=0)
    if experts:
        raise UnsupportedModel(
            "mixtures of experts are not implemented for this architecture",
            where=f"{keys.prefix}expert_count",
            expected=0,
            got=experts,
        )
