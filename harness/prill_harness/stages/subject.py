"""What a walk over the stages of a model knows of its file, read independently of the runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from prill_harness.planting import faults
from prill_harness.stages.bisect import Subject
from prill_runtime.gguf.file import open_gguf
from prill_runtime.models import walks
from prill_runtime.models.base import Stage
from prill_runtime.models.load import describe


def stage_table(path: str | Path) -> dict[str, Stage]:
    """Every stage of a model file's network by name, in execution order; read with faults suspended.

    Raises:
        ModelFileError: the file is malformed. UnsupportedModel: nobody described its architecture.
    """
    with faults.only(()), open_gguf(path) as file:
        return walks.stages(describe(file))


@contextmanager
def open_subject(path: str | Path) -> Iterator[Subject]:
    """The subject of a model file, which stays open as long as the context; read with faults suspended.

    Weights are dequantised by the `gguf` package, not by the runtime.

    Raises:
        ModelFileError: the file is malformed. UnsupportedModel: nobody described its architecture.
    """
    table = stage_table(path)
    with faults.only(()):
        file = open_gguf(path)
    try:
        with faults.only(()):
            tensors, parts = dict(file.tensors), file.paths
        known_weights: dict[str, NDArray[np.float64]] = {}

        def raw(name: str, shift: int = 0) -> tuple[NDArray[np.uint8], str] | None:
            info = tensors.get(name)
            if info is None:
                return None
            with parts[info.part].open("rb") as stream:
                stream.seek(max(0, info.offset + shift))
                data = np.frombuffer(stream.read(info.nbytes), dtype=np.uint8)
            return np.pad(data, (0, info.nbytes - data.size)), info.type.name

        def weight(name: str) -> NDArray[np.float64] | None:
            if name not in known_weights:
                found = raw(name)
                if found is None:
                    return None
                values = gguf.quants.dequantize(found[0], tensors[name].type)
                known_weights[name] = np.asarray(values, np.float64).reshape(tensors[name].shape)
            return known_weights[name]

        yield Subject(weight, raw, table)
    finally:
        file.close()
