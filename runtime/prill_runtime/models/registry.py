"""Find the function that describes an architecture.

There is one description of each. prill's own are the files of `architectures`: each has the name of its
architecture, `-` written `_`, and a function `model`. Others are installed under the entry point group
`prill.architectures`, as NAME = "module:function". Those are imported when a file of theirs is opened and not
before, so that one that is broken stops nobody else. `declare` adds one for the rest of the process.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from prill_runtime.errors import DescriptionError, PrillError
from prill_runtime.models.keys import Keys
from prill_runtime.models.nodes.network import Network

GROUP = "prill.architectures"
OURS = ("<", str(Path(__file__).parents[1]), str(Path(importlib.__file__).parent))  # no frames of a plugin's
Description = Callable[[Keys], Network]
_declared: dict[str, Description] = {}


def declare(architecture: str, model: Description) -> None:
    """Describe an architecture that has no file here, for the rest of the process."""
    _declared[architecture] = model


def packaged() -> dict[str, Description]:
    """prill's own descriptions by architecture."""
    stems = sorted(path.stem for path in Path(__file__).parent.glob("architectures/[a-z]*.py"))
    modules = {stem: importlib.import_module(f"{__package__}.architectures.{stem}") for stem in stems}
    return {stem.replace("_", "-"): module.model for stem, module in modules.items()}


@cache
def installed() -> dict[str, tuple[EntryPoint, ...]]:
    """What other packages describe, by architecture; nothing of it is imported."""
    points = entry_points(group=GROUP)
    return {name: tuple(points.select(name=name)) for name in sorted(points.names)}


def names() -> list[str]:
    """Every architecture that somebody described, whether or not the description can be loaded."""
    return sorted({*_declared, *packaged(), *installed()})


def load(architecture: str) -> Description:
    """The function that describes an architecture, one of `names()`.

    Raises:
        DescriptionError: an installed one that cannot be imported or called; two of the same architecture.
    """
    own = {**_declared, **packaged()}.get(architecture)
    points = installed().get(architecture, ())
    if len(points) + (own is not None) > 1:
        others = " and ".join(map(_told, points))
        raise DescriptionError(
            f"{architecture} is described more than once", expected="one description",
            got=f"prill's own and {others}" if own else others,
            hint="uninstall all packages but one, or give the architecture a name of its own",
        )  # fmt: skip
    if own is not None:
        return own
    with _blaming(points[0]):
        made = points[0].load()
        if not callable(made):
            raise TypeError(f"{points[0].attr} cannot be called")
    return partial(_network, points[0], made)


def _network(point: EntryPoint, model: Callable[[Keys], object], keys: Keys) -> Network:
    """What an installed description makes of a file.

    Raises:
        DescriptionError: it raises what is no refusal of the file, or returns what is no model.
    """
    with _blaming(point):
        made = model(keys)
        if not isinstance(made, Network):
            raise TypeError(f"{point.attr} returns no Network but {type(made).__name__}")
    return made


@contextmanager
def _blaming(point: EntryPoint) -> Iterator[None]:
    """Whatever goes wrong in somebody else's code is said in one sentence, with the line of theirs."""
    try:
        yield
    except PrillError:
        raise
    except Exception as error:
        theirs = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(OURS)]
        at = f" at {theirs[-1].filename}, line {theirs[-1].lineno}" if theirs else ""
        raise DescriptionError(
            f"{type(error).__name__}: {error}{at}", where=_told(point),
            expected=f"a function that describes {point.name}",
            hint="correct or uninstall it; models of other architectures do without it",
        ) from error  # fmt: skip


def _told(point: EntryPoint) -> str:
    """What an entry point names, and the package that installed it."""
    return f"{point.value} of {point.dist.name} {point.dist.version}" if point.dist else point.value
