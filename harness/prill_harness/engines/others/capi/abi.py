"""prill_engine.h from Python: its codes, its functions and the buffers that they are given.

Imports nothing but the standard library, for a process of its own is made for every few calls.
"""

from __future__ import annotations

import base64
import ctypes
from collections.abc import Callable, Mapping
from typing import Any

VERSION = 1
CODES = (
    "ok", "invalid_device", "out_of_memory", "model_load_failed", "inference_failed", "invalid_parameter",
    "kernel_launch_failed", "residency_violated", "device_not_found", "context_length_exceeded", "cancelled",
    "unsupported_type", "tokenizer", "not_a_number", "device_lost", "unknown",
)  # fmt: skip
"""The kind of error that each number stands for, from 0."""
GUARD, PATTERN = 64, 0x5A  # bytes behind every buffer, which nobody may write
SENTENCE_BYTES = 1024


class DeviceInfo(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_char * size) for name, size in (
        ("name", 64), ("version", 32), ("device", 32), ("arithmetic", 16)))  # fmt: skip


SIZES = ("vocab_size", "n_layers", "width", "n_heads", "n_kv_heads", "head_dim", "ffn", "context_length")


class ModelInfo(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in SIZES),
        ("norm_eps", ctypes.c_float),
        ("rope_base", ctypes.c_float),
        ("eos_id", ctypes.c_int32),
    )


class Sampling(ctypes.Structure):
    _fields_ = (
        ("temperature", ctypes.c_float), ("top_k", ctypes.c_int32), ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float), ("repetition_penalty", ctypes.c_float), ("seed", ctypes.c_uint64),
    )  # fmt: skip


class Memory(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("weights", "cache", "other"))


GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0}
NUMBERS: Mapping[str, Any] = {"i32": ctypes.c_int32, "u64": ctypes.c_uint64, "f32": ctypes.c_float}
STRUCTURES: Mapping[str, Any] = {"device": DeviceInfo, "model": ModelInfo, "memory": Memory}
FUNCTIONS: Mapping[str, Mapping[str, str]] = {
    "context_create": {"device": "i32", "options": "text", "out": "u64*"},
    "context_destroy": {"context": "u64"},
    "context_device": {"context": "u64", "out": "device*"},
    "context_memory": {"context": "u64", "out": "memory*"},
    "model_load": {"context": "u64", "path": "text", "out": "u64*"},
    "model_describe": {"model": "u64", "out": "model*"},
    "model_free": {"model": "u64"},
    "session_create": {"model": "u64", "positions": "u64", "out": "u64*"},
    "session_logits": {"session": "u64", "ids": "ids", "count": "u64", "out": "floats", "room": "u64"},
    "session_next": {
        "session": "u64", "ids": "ids", "count": "u64", "sampling": "sampling", "id": "i32*",
        "logprob": "f32*",
    },
    "session_cancel": {"session": "u64"},
    "session_free": {"session": "u64"},
    "last_error": {"out": "chars", "bytes": "u64", "needed": "u64*"},
}  # fmt: skip
"""Function, without its prefix -> its arguments in order, and what each is; `*` is written by the callee."""


class Unusable(Exception):
    """The library cannot be called at all; the argument is a clause."""


class RawLibrary:
    """A loaded library; `call` makes one call.

    Raises:
        Unusable: no such library, a function is missing, or it was built for another version.
    """

    def __init__(self, path: str) -> None:
        try:
            self._loaded = ctypes.CDLL(path)
        except OSError as error:
            raise Unusable(f"the library cannot be loaded: {error}") from None
        missing = [f"prill_{name}" for name in ("abi_version", *FUNCTIONS) if not self._has(name)]
        if missing:
            raise Unusable(f"the library exports no {', '.join(missing)}")
        self._loaded.prill_abi_version.restype = ctypes.c_uint32
        if (version := self._loaded.prill_abi_version()) != VERSION:
            raise Unusable(f"the library has version {version} of the interface, expected {VERSION}")

    def _has(self, name: str) -> bool:
        return hasattr(self._loaded, f"prill_{name}")

    def prepared(self, name: str, given: Mapping[str, Any]) -> tuple[Callable[[], int], Buffers]:
        """The call, ready to be made, and the buffers that it will write.

        Args:
            given: values of arguments by name; None is a null pointer. What is left out is sound: a buffer of
                the right size, the greedy sampling, no options, the count of `ids`, the room of `out`.
        """
        buffers = Buffers(FUNCTIONS[name], given)
        function = self._loaded[f"prill_{name}"]
        function.restype = ctypes.c_int32
        return lambda: int(function(*buffers.arguments)), buffers

    def call(self, name: str, **given: Any) -> tuple[int, dict[str, Any]]:
        """Code and what was written."""
        call, buffers = self.prepared(name, given)
        code = call()
        return code, buffers.read(code)

    def sentence(self) -> str:
        """Of the last failed call in this thread."""
        said = self.call("last_error", bytes=SENTENCE_BYTES)[1].get("out", "")
        return str(said)


class Buffers:
    """The arguments of one call, with a guard behind each buffer."""

    def __init__(self, wanted: Mapping[str, str], given: Mapping[str, Any]) -> None:
        self._kept: dict[str, tuple[str, Any, int]] = {}
        self.arguments: list[Any] = []
        for name, kind in wanted.items():
            self.arguments.append(self._made(name, kind, given))

    def _made(self, name: str, kind: str, given: Mapping[str, Any]) -> Any:
        if kind in NUMBERS:
            count = len(given.get("ids") or ()) if name == "count" else 0
            return NUMBERS[kind](given.get(name, count))
        if name in given and given[name] is None:
            return None
        if kind == "text":
            text = given.get(name)
            return None if text is None else ctypes.c_char_p(str(text).encode("utf-8", "surrogateescape"))
        if kind == "ids":
            ids = list(given.get(name) or (0,))
            return self._buffer(name, kind, bytes((ctypes.c_int32 * len(ids))(*ids)))
        if kind == "sampling":
            return self._buffer(name, kind, bytes(Sampling(**{**GREEDY, **(given.get(name) or {})})))
        own = {
            "floats": 4 * int(given.get("held", given.get("room", 0))),
            "chars": int(given.get("bytes", 0)),
        }
        what = kind.removesuffix("*")
        size = own[kind] if kind in own else ctypes.sizeof({**NUMBERS, **STRUCTURES}[what])
        return self._buffer(name, kind, bytes([PATTERN]) * size)

    def _buffer(self, name: str, kind: str, data: bytes) -> Any:
        whole = ctypes.create_string_buffer(data + bytes([PATTERN]) * GUARD, len(data) + GUARD)
        self._kept[name] = kind, whole, len(data)
        return whole

    def read(self, code: int) -> dict[str, Any]:
        """What a successful call wrote, by name; `overrun`: the buffers written behind their end."""
        over = [n for n, (_, b, size) in self._kept.items() if b.raw[size:] != bytes([PATTERN]) * GUARD]
        found: dict[str, Any] = {"overrun": over} if over else {}
        for name, (kind, buffer, size) in self._kept.items():
            data = buffer.raw[:size]
            if code or kind in ("ids", "sampling"):
                continue
            if kind == "floats":
                found[name] = base64.b64encode(data).decode()
            elif kind == "chars":
                found[name] = data.split(b"\0")[0].decode("utf-8", "replace")
            elif (what := kind.removesuffix("*")) in NUMBERS:
                found[name] = NUMBERS[what].from_buffer_copy(data).value
            else:
                made = STRUCTURES[what].from_buffer_copy(data)
                found |= {field: _plain(getattr(made, field)) for field, *_ in made._fields_}
        return found


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
