"""Refuse GGUF files that are not a model's weights (adapters, projectors and so on), and say what they are.

Sources: constants of gguf (`general.type`); converters of llama.cpp (LoRA, mmproj, vocabulary only), its
gguf-split, imatrix and cvector-generator. Files older than `general.type` are known by their tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from prill_runtime.errors import UnsupportedModel
from prill_runtime.gguf.file import GGUFFile
from prill_runtime.gguf.header import quoted
from prill_runtime.gguf.split import sibling_name

TYPE: Final = "general.type"
MODEL: Final = "model"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of GGUF file other than a model.

    Attributes:
        said: values of `general.type`. architectures: values of `general.architecture`.
        tensors: what the names of its tensors match, all of them; None when it has no names of its own.
        what: it is, as a noun. todo: what to do instead.
    """

    said: tuple[str, ...]
    architectures: tuple[str, ...]
    tensors: re.Pattern[str] | None
    what: str
    todo: str


BASE: Final = "name the model it belongs to"
KINDS: Final = (
    Kind(
        ("adapter",),
        (),
        re.compile(r".+\.lora_[ab]"),
        "a LoRA adapter",
        "merge it into its base model and name the result",
    ),
    Kind(
        ("mmproj",),
        ("clip",),
        re.compile(r"(mm|v|a|resampler|model\.mm)\..+"),
        "a multimodal projector (mmproj, CLIP)",
        BASE,
    ),
    Kind(("imatrix",), ("imatrix",), re.compile(r".+\.(in_sum2|counts)"), "an importance matrix", BASE),
    Kind(("controlvector",), ("controlvector",), re.compile(r"direction\.\d+"), "a control vector", BASE),
)
VOCABULARY: Final = Kind(
    ("vocab",), (), None, "a vocabulary only, without a single tensor", "name a file with the model's weights"
)


def kind_of(file: GGUFFile) -> Kind | None:
    """What the file is if it is no model: by its stated type, else by its tensors."""
    said, names = file.metadata.get(TYPE), file.tensors.keys()
    tests: tuple[Callable[[Kind], bool], ...] = (
        lambda kind: said in kind.said,
        lambda kind: file.architecture in kind.architectures,
        lambda kind: _all_match(kind.tensors, names),
    )
    for test in tests:
        for kind in (*KINDS, VOCABULARY):
            if test(kind):
                return kind
    return None if names else VOCABULARY


def require_model(file: GGUFFile) -> None:
    """Make sure that the file holds the weights of one whole model.

    Raises:
        UnsupportedModel: it is a part of one, or something else; the sentence says what.
    """
    where, (number, count) = str(file.path), file.place
    if number:
        first = sibling_name(file.path, 0, count)
        raise UnsupportedModel(
            f"the file is part {number + 1} of {count} of a split model",
            where=where,
            expected="the first part, which brings the others with it",
            hint=f"name {first or 'that one'} instead",
        )
    kind, said = kind_of(file), file.metadata.get(TYPE, MODEL)
    if kind is not None:
        raise UnsupportedModel(
            f"the file is {kind.what}", where=where, expected="a model with its weights", hint=kind.todo
        )
    if said != MODEL:
        raise UnsupportedModel(
            f"the file is not a model by its {TYPE}",
            where=where,
            expected=MODEL,
            got=quoted(str(said)),
            hint="name a file with a model's weights",
        )


def _all_match(pattern: re.Pattern[str] | None, names: Collection[str]) -> bool:
    return pattern is not None and bool(names) and all(map(pattern.fullmatch, names))
