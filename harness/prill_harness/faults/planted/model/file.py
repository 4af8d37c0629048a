"""Faults of reading and wiring a model file."""

from __future__ import annotations

import atexit
import functools
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ANOTHER, ONE, around, description, op, wiring
from prill_runtime.gguf.file import open_gguf

FILE = ("file",)
Q8_0, Q4_K = (f"{ONE[0]}:q8_0",), (f"{ONE[0]}:q4_k",)
Bytes = NDArray[np.uint8]
Damage = Callable[[Bytes], None]


@fault(area="file", blames=FILE, models=ONE)
def tensor_offset_by_one_alignment() -> Iterator[Patch]:
    """One tensor is read 32 bytes behind its place."""

    def raw(original: Any, self: Any, name: str) -> Any:
        data = original(self, name)
        if name != "blk.0.attn_q.weight":
            return data
        info = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, info.nbytes, info.offset + self.alignment)

    yield around("prill_runtime.gguf.file:GGUFFile.raw", raw)


@fault(area="file", blames=FILE, models=ONE)
def unknown_type_as_f16() -> Iterator[Patch]:
    """A tensor of an unknown type is read as F16."""

    def tensor_type(original: Any, cursor: Any, tensor: str) -> Any:
        from gguf import GGMLQuantizationType

        from prill_runtime.errors import ModelFileError

        try:
            return original(cursor, tensor)
        except ModelFileError:
            return GGMLQuantizationType.F16

    yield around("prill_runtime.gguf.tensors:_tensor_type", tensor_type)


@fault(area="file", blames=FILE, models=ONE)
def tensor_zero_filled() -> Iterator[Patch]:
    """One tensor is never loaded and stays zero."""
    yield op("weight", lambda o, self, raw, info: o(self, raw, info) * (info.name != "blk.1.ffn_down.weight"))


def _zeroed(weights: dict[str, Any], ending: str) -> None:
    for name in weights:
        if name.endswith(ending):
            weights[name] = np.zeros_like(weights[name])


@fault(area="file", blames=FILE, models=ONE)
def ffn_down_not_wired() -> Iterator[Patch]:
    """The feed-forward layers' output matrices are not connected, and nothing comes out of them."""

    yield wiring(lambda weights: _zeroed(weights, "ffn_down.weight"))


@fault(area="file", blames=FILE, needs=("bias", "fused_qkv"))
def qkv_bias_dropped() -> Iterator[Patch]:
    """The biases of query, key and value are not loaded."""

    yield wiring(lambda weights: _zeroed(weights, "attn_qkv.bias"))


@fault(area="file", blames=FILE, models=ONE)
def f32_norm_read_as_f16() -> Iterator[Patch]:
    """The F32 weights of norms are read as F16."""

    def weight(original: Any, self: Any, raw: Any, info: Any) -> Any:
        if "norm" not in info.name:
            return original(self, raw, info)
        return raw.view("<f2")[: info.shape[0]].astype(self.dtype)

    yield op("weight", weight)


@fault(area="file", blames=FILE, models=ONE)
def matrix_transposed() -> Iterator[Patch]:
    """The dimensions of feed-forward matrices, which are not square, are taken in the wrong order."""

    def weight(original: Any, self: Any, raw: Any, info: Any) -> Any:
        right = original(self, raw, info)
        swapped = "ffn" in info.name and right.ndim == 2
        return np.ascontiguousarray(right.reshape(right.shape[::-1]).T) if swapped else right

    yield op("weight", weight)


@fault(area="file", blames=FILE, needs=("gate",))
def tensors_exchanged() -> Iterator[Patch]:
    """Gate and up matrices of one layer are loaded under each other's name."""

    def exchanged(weights: Any) -> None:
        gate, up = "blk.2.ffn_gate.weight", "blk.2.ffn_up.weight"
        weights[gate], weights[up] = weights[up], weights[gate]

    yield wiring(exchanged)


@functools.cache
def damaged(path: Path, tensor: str, damage: Damage) -> Path:
    """A copy of the file in which the bytes of one tensor are damaged; it goes away with the process."""
    folder = tempfile.mkdtemp(prefix="prill-fault-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    data = np.fromfile(path, np.uint8)
    with open_gguf(path) as file:
        info = file.tensors[tensor]
    damage(data[info.offset : info.offset + info.nbytes])
    copy = Path(folder, path.name)
    data.tofile(copy)
    return copy


def on_disk(tensor: str, damage: Damage) -> Patch:
    """A packaged file whose tensor `damage` changes in place, given its bytes (nbytes,)."""
    return around("prill_harness.engines.models:_fixture", lambda o, text: damaged(o(text), tensor, damage))


@fault(area="file", blames=FILE, models=ONE)
def weight_flipped() -> Iterator[Patch]:
    """One bit of the packaged file is another than when it was recorded."""

    def flip(raw: Bytes) -> None:
        raw[-1] ^= 0x40

    yield on_disk("blk.3.ffn_up.weight", flip)


@fault(area="file", blames=FILE, models=Q8_0)
def file_scale_not_a_number() -> Iterator[Patch]:
    """The scale of one Q8_0 block in the file is NaN."""

    def spoil(raw: Bytes) -> None:
        raw.reshape(-1, 34)[100, :2] = 0x00, 0x7E

    yield on_disk("blk.1.ffn_down.weight", spoil)


@fault(area="file", blames=FILE, models=ONE)
def file_infinity() -> Iterator[Patch]:
    """One weight of the embedding table in the file is infinite, in a row that hardly a text reads."""

    def spoil(raw: Bytes) -> None:
        raw.view("<u2")[-7] = 0x7C00

    yield on_disk("token_embd.weight", spoil)


@fault(area="file", blames=FILE, models=ONE)
def file_zero_tail() -> Iterator[Patch]:
    """The write of one tensor stopped inside a row, and the rest of it in the file is zero."""

    def stop(raw: Bytes) -> None:
        raw[raw.size // 2 + 37 :] = 0

    yield on_disk("blk.1.ffn_up.weight", stop)


@fault(area="file", blames=FILE, models=Q4_K)
def file_zero_run() -> Iterator[Patch]:
    """A piece in the middle of a quantised tensor was never written, and is zero in the file."""

    def skip(raw: Bytes) -> None:
        raw[raw.size // 3 + 5 : raw.size // 2] = 0

    yield on_disk("blk.2.attn_output.weight", skip)


@fault(area="file", blames=FILE, models=ONE)
def file_tensor_constant() -> Iterator[Patch]:
    """Every weight of one matrix in the file is the same."""

    def fill(raw: Bytes) -> None:
        raw.view("<f2")[:] = 0.0625

    yield on_disk("blk.0.attn_v.weight", fill)


@fault(area="file", blames=FILE, models=Q8_0)
def file_scale_times_4096() -> Iterator[Patch]:
    """The scale of one Q8_0 block in the file is 4096 times what it was."""

    def enlarge(raw: Bytes) -> None:
        raw.reshape(-1, 34)[77, :2].view("<f2")[:] *= 4096

    yield on_disk("blk.2.ffn_gate.weight", enlarge)


@fault(area="file", blames=FILE, models=ONE)
def file_swapped() -> Iterator[Patch]:
    """The engine opens another file than the one it was given."""
    yield around("prill_harness.engines.embedded:resolve_model", lambda o, model: o(ANOTHER[0]))


@fault(area="file", blames=FILE, models=ONE)
def digest_of_header_alone() -> Iterator[Patch]:
    """The digest covers the first 4096 bytes of the file and none of its weights."""

    def sha256(self: Any) -> str:
        return hashlib.sha256(Path(self.path).read_bytes()[:4096]).hexdigest()

    yield Patch("prill_runtime.gguf.file:GGUFFile.sha256", lambda original: property(sha256))


@fault(area="file", blames=FILE, models=ONE)
def count_unchecked() -> Iterator[Patch]:
    """Counts and lengths are not held against the size of the file."""
    yield around("prill_runtime.gguf.header:Cursor.room_for", lambda o, self, *rest: None)


@fault(area="file", blames=FILE, models=ONE)
def truncation_unchecked() -> Iterator[Patch]:
    """A table that promises more bytes than the file has is believed."""

    def read_table(original: Any, cursor: Any, count: int, alignment: int) -> Any:
        cursor.size = 1 << 62
        return original(cursor, count, alignment)

    yield around("prill_runtime.gguf.file:read_table", read_table)
    yield around("prill_runtime.gguf.tensors:_check_gap", lambda o, *rest: None)


@fault(area="file", blames=FILE, models=ONE)
def duplicate_accepted() -> Iterator[Patch]:
    """A second key or tensor of one name is accepted under another."""

    def text(original: Any, self: Any, what: str, limit: int | None = None) -> str:
        name: str = original(self, what, limit)
        if what not in ("metadata key", "tensor name"):
            return name
        seen = vars(self).setdefault("seen", set())
        name += "~" * (name in seen)
        seen.add(name)
        return name

    yield around("prill_runtime.gguf.header:Cursor.text", text)


@fault(area="file", blames=FILE, models=ONE)
def alignment_unchecked() -> Iterator[Patch]:
    """Tensors may begin at any byte."""
    yield around("prill_runtime.gguf.tensors:_read_entry", lambda o, cursor, alignment: o(cursor, 1))


@fault(area="file", blames=FILE, models=ONE)
def overlap_unchecked() -> Iterator[Patch]:
    """Tensors may lie on each other, and bytes belong to none."""
    yield around("prill_runtime.gguf.tensors:_check_layout", lambda o, *rest: None)


@fault(area="file", blames=FILE, models=ONE)
def unknown_architecture_guessed() -> Iterator[Patch]:
    """A file of an unknown architecture is taken for a llama."""

    def open_gguf(original: Any, path: Any) -> Any:
        from prill_runtime.models import registry

        file = original(path)
        if file.architecture not in registry.names():
            file.metadata = dict(file.metadata) | {"general.architecture": "llama"}
        return file

    yield around("prill_runtime.run.model:open_gguf", open_gguf)


@fault(area="file", blames=FILE, models=ONE)
def context_length_halved() -> Iterator[Patch]:
    """The engine works with half the context that the file states."""

    yield description(lambda network: replace(network, context=network.context // 2))
