"""Find the parts of a split model and check that they belong together.

Source: llama.cpp's gguf-split. Every part holds `split.no` (from 0), `split.count` and `split.tensors.count`,
the first one all other metadata as well; files are called `NAME-00001-of-00003.gguf`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from prill_runtime.errors import ModelFileError
from prill_runtime.gguf.header import quoted

NUMBER: Final = "split.no"
COUNT: Final = "split.count"
TENSORS: Final = "split.tensors.count"
MAX_PARTS: Final = 99_999  # that the five digits of a name can count
_NAME: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)

Part = tuple[tuple[int, int], Mapping[str, Any], Collection[str]]


def place(metadata: Mapping[str, Any]) -> tuple[int, int]:
    """(number from 0, count) of a part; (0, 1) of a file that is not split."""
    count = metadata.get(COUNT, 1)
    return (metadata.get(NUMBER, 0), count) if isinstance(count, int) and count > 1 else (0, 1)


def check_keys(metadata: Mapping[str, Any], *, path: str) -> None:
    """Check that the three keys are integers that agree with one another.

    Raises:
        ModelFileError: naming the key.
    """
    count = metadata.get(COUNT, 1)
    limits = {COUNT: (0, MAX_PARTS), NUMBER: (0, max(0, count - 1) if isinstance(count, int) else 0)}
    for key, (least, most) in limits.items():
        value = metadata.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ModelFileError(
                f"{key} is out of range", where=path, expected=f"{least} to {most}", got=repr(value)
            )


def sibling_name(path: Path, number: int, count: int) -> str | None:
    """The file name of part `number` (from 0), from another part's; None if that has no number."""
    named = _NAME.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        return None
    return f"{named[1]}-{number + 1:05}-of-{count:05}.gguf"


def sibling(first: Path, number: int, count: int) -> Path:
    """The file of part `number` (from 0) beside the first.

    Raises:
        ModelFileError: the first part's name does not say what the others are called, or there is none.
    """
    wanted = f"part {number + 1} of {count} of the split model"
    name = sibling_name(first, number, count)
    if name is None or first.name != sibling_name(first, 0, count):
        raise ModelFileError(
            f"{wanted} cannot be found by this name",
            where=str(first),
            expected=f"a name that ends in -00001-of-{count:05}.gguf",
            got=quoted(first.name),
            hint="give all parts the names that they were written with",
        )
    path = first.with_name(name)
    if not path.is_file():
        raise ModelFileError(
            f"{wanted} is missing",
            where=str(first),
            expected=f"{path.name} in the same folder",
            got="no such file",
            hint="put all parts into one folder",
        )
    return path


def check(path: str, parts: Sequence[Part]) -> None:
    """Check that the parts, as (place, metadata, tensor names) in order, make one model.

    Raises:
        ModelFileError: a part of another model or in another's place, a tensor twice, tensors missing.
    """
    count, seen = len(parts), set[str]()
    for number, (found, _, tensors) in enumerate(parts):
        if found != (number, count):
            raise ModelFileError(
                f"part {number + 1} of {count} of the split model is another file",
                where=path,
                expected=f"{NUMBER} {number} and {COUNT} {count}",
                got=f"{found[0]} and {found[1]}",
            )
        twice = sorted(seen & set(tensors))
        if twice:
            raise ModelFileError(
                f"part {number + 1} of {count} of the split model repeats a tensor",
                where=path,
                expected="each in one part",
                got=quoted(twice[0]),
            )
        seen |= set(tensors)
    promised = parts[0][1].get(TENSORS, len(seen))
    if promised != len(seen):
        raise ModelFileError(
            "tensors of the split model are missing", where=path, expected=promised, got=len(seen)
        )
