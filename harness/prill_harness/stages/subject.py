"""A model file goes in; what a walk over its stages knows of it comes out, read apart from the adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from prill_harness.planting import core as faults
from prill_harness.stages.bisect import Subject
from prill_harness.stages.table import BLOCKS
from prill_harness.witness.declared import declared
from prill_runtime.errors import UnsupportedModel
from prill_runtime.gguf.file import open_gguf


@contextmanager
def open_subject(path: str | Path) -> Iterator[Subject]:
    """The subject of a model file, which stays open as long as the context; read without planted faults.

    Weights are dequantised by the `gguf` package, not by the runtime.

    Raises:
        ModelFileError: the file is malformed. UnsupportedModel: its architecture has no stage table.
    """
    with faults.only(()):
        file = open_gguf(path)
    try:
        with faults.only(()):
            if file.architecture not in BLOCKS:
                known = " or ".join(BLOCKS)
                raise UnsupportedModel(
                    "no stage table", where=str(path), expected=known, got=repr(file.architecture)
                )
            config = declared(file)
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

        yield Subject(config, weight, raw)
    finally:
        file.close()
