"""What several suites share: the model inside an engine, the file's own fields, refusals, and equality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.base import Engine
from prill_harness.run.checks import Observer
from prill_runtime.errors import MissingCapability, PrillError
from prill_runtime.ops.protocol import Backend
from prill_runtime.run.model import Model

FILE_READER = "gguf.GGUFReader on the same file"
# NMSE of work whose sums were only grouped differently, by arithmetic (docs/adr/0002-lanes.md, ops):
# engines that round activations round them elsewhere in a prompt than in single tokens.
SAME = {"float32": 1e-10, "float64": 1e-10, "half": 1e-5, "int8": 5e-4}
LOOKED_UP = 1 << 18  # values of a device matrix looked at together
DIFFERENT = 1e-4  # a negative control must move the result at least this far


def embedded(engine: Engine) -> Model:
    """The runtime's model inside an embedded engine.

    Raises:
        MissingCapability: somebody else's engine; its weights cannot be read from here.
    """
    model = getattr(engine, "model", None)
    if not isinstance(model, Model):
        raise MissingCapability(f"engine {engine.info.name} does not let its weights be read")
    return model


def weight_values(backend: Backend[Any], weight: Any) -> NDArray[Any]:
    """A weight's values on the host, whatever the backend keeps; matrices in blocks are looked up by row."""
    if isinstance(weight, np.ndarray) or weight.ndim != 2:
        return np.asarray(weight)
    rows, columns = weight.shape
    step = max(1, LOOKED_UP // columns)
    pieces = [np.arange(low, min(low + step, rows)) for low in range(0, rows, step)]
    return np.concatenate([np.array(backend.embed(weight, ids)) for ids in pieces])


def file_fields(path: Path) -> dict[str, Any]:
    """Every metadata value of a GGUF file, as gguf reads it."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def file_parts(path: Path) -> tuple[Path, ...]:
    """The files of a model, in their order: more than one when gguf reads that the first is split."""
    return _parts(path, gguf.GGUFReader(path))


def _parts(path: Path, reader: gguf.GGUFReader) -> tuple[Path, ...]:
    split = reader.fields.get("split.count")
    count = 1 if split is None else int(split.contents())
    first = f"-00001-of-{count:05}.gguf"
    if count < 2 or not path.name.endswith(first):
        return (path,)
    name = path.name.removesuffix(first)
    return tuple(path.with_name(f"{name}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1))


def file_tensors(path: Path) -> list[gguf.ReaderTensor]:
    """Every tensor of a model, as gguf reads it in whichever part it lies."""
    first = gguf.GGUFReader(path)
    readers = (first, *map(gguf.GGUFReader, _parts(path, first)[1:]))
    return [tensor for reader in readers for tensor in reader.tensors]


def refusal(observe: Observer, what: str, call: Callable[[], object], exit_code: int, *says: str) -> str:
    """The one sentence with which `call` refuses; anything else fails the check.

    Args:
        says: words or numbers the sentence must contain.
    """
    try:
        call()
    except PrillError as error:
        sentence, code = str(error), error.exit_code
    except Exception as error:
        observe.fail(f"{what}: expected one sentence, got {type(error).__name__}: {error}")
    else:
        observe.fail(f"{what}: expected a refusal, but it was accepted")
    whole = len(sentence) > 20 and "\n" not in sentence and "Traceback" not in sentence
    observe.expect(whole, f"{what}: the refusal is not one sentence: {sentence!r}")
    observe.expect(code == exit_code, f"{what}: expected exit code {exit_code}, got {code}: {sentence}")
    for word in says:
        observe.expect(word in sentence, f"{what}: the refusal does not say {word!r}: {sentence}")
    observe.saw(1, oracle="the list of errors this suite provokes, each with its exit code and words")
    return sentence


def rounding(engine: Engine) -> float:
    """The NMSE by which two ways to the same result may differ.

    Raises:
        MissingCapability: an engine that does not say what it computes in.
    """
    if engine.info.arithmetic not in SAME:
        raise MissingCapability(f"no bound for the arithmetic {engine.info.arithmetic!r}")
    return SAME[engine.info.arithmetic]


def fed(engine: Engine, pieces: Sequence[Sequence[int]], capacity: int | None = None) -> NDArray[np.float32]:
    """Logits of a fresh session fed piece by piece, joined: (positions, vocab)."""
    session = engine.session(capacity)
    try:
        return np.concatenate([session.feed(piece) for piece in pieces])
    finally:
        session.close()


def at_offset(engine: Engine, pieces: list[list[int]], offsets: list[int]) -> NDArray[np.floating]:
    """Logits of pieces fed into one cache whose position offset is set before each piece."""
    model = embedded(engine)
    cache = model.new_cache(sum(map(len, pieces)))
    rows = []
    for piece, offset in zip(pieces, offsets, strict=True):
        cache.offset = offset
        rows.append(model.forward([(cache, piece)])[0])
    return np.concatenate(rows)
