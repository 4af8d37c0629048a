"""The JSON lines protocol: how arrays, errors and calls are written.

A line is one JSON object. prill writes calls, the worker answers each before it reads the next:

    > {"id": 0, "call": "hello", "protocol": 1, "model": "/models/m.gguf"}
    < {"id": 0, "result": {"name": "mine", "arithmetic": "float32", "calls": ["tokenize", "logits"]}}
    > {"id": 1, "call": "tokenize", "text": "The ", "add_special": true}
    < {"id": 1, "result": [1, 450, 29871]}
    > {"id": 2, "call": "logits", "ids": [1, 450]}
    < {"id": 2, "result": {"dtype": "float32", "shape": [2, 32000], "base64": "…"}}
    > {"id": 3, "call": "generate", "ids": [1, 450], "max_tokens": 8, "stream": true, "temperature": 0.0, …}
    < {"id": 3, "token": 4996, "logprob": -1.25}
    > {"id": 3, "go": true}
    < {"id": 3, "result": {"ids": [4996], "logprobs": [-1.25], "finish_reason": "length"}}
    < {"id": 4, "error": {"kind": "context_length_exceeded", "message": "…"}}

Arrays may be nested lists instead. Without "stream" no tokens are told; "go": false cancels. Bytes, as
`detokenize` returns them, are {"base64": "…"} or a text.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.others.capi.abi import CODES
from prill_runtime.errors import (
    ContextLengthExceeded,
    EngineError,
    InvalidParameter,
    MissingCapability,
    ModelFileError,
    NotANumber,
    PrillError,
    Reported,
    UnsupportedModel,
    UsageError,
)

PROTOCOL = 1
KINDS: Mapping[str, type[PrillError]] = {
    "context_length_exceeded": ContextLengthExceeded,
    "not_a_number": NotANumber,
    "invalid_parameter": InvalidParameter,
    "missing_capability": MissingCapability,
    "model_load_failed": ModelFileError,
    "unsupported_type": UnsupportedModel,
    "usage": UsageError,
    "engine": EngineError,
}
"""Errors by their names in the protocol; the other kinds of prill_engine.h are `Reported`, and any other name
is a failure of the engine."""
FACTS = ("expected", "got")
"""What an error may say beside its message."""
DTYPES = ("float16", "float32", "float64", "int32", "int64")


def packed(value: Any) -> Any:
    """A value as JSON builtins, with arrays and bytes in base64."""
    if isinstance(value, np.ndarray):
        data = base64.b64encode(value.tobytes()).decode()
        return {"dtype": str(value.dtype), "shape": list(value.shape), "base64": data}
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {name: packed(each) for name, each in value.items()}
    return [packed(each) for each in value] if isinstance(value, list | tuple) else value


def unpacked(value: Any) -> Any:
    """The value that `packed` encoded.

    Raises:
        ValueError: invalid base64, a type that is not in DTYPES, a shape that does not fit the bytes.
    """
    if isinstance(value, list):
        return [unpacked(each) if isinstance(each, list | dict) else each for each in value]
    if not isinstance(value, dict):
        return value
    if "base64" not in value:
        return {name: unpacked(each) for name, each in value.items()}
    try:
        data = base64.b64decode(value["base64"], validate=True)
    except (TypeError, binascii.Error) as error:
        raise ValueError(f"base64: {error}") from None
    return data if "dtype" not in value else _array(data, value["dtype"], value.get("shape"))


def _array(data: bytes, dtype: Any, shape: Any) -> NDArray[Any]:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(each) is int and each >= 0 for each in shape):
        raise ValueError(f"shape {shape!r}")
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape)


def error_of(said: Any, where: str) -> PrillError:
    """The exception for an error that a worker reports."""
    said = said if isinstance(said, Mapping) else {"message": said}
    kind, message = str(said.get("kind", "engine")), str(said.get("message", "no message"))
    facts = {name: str(said[name]) for name in FACTS if name in said}
    if (cls := KINDS.get(kind)) is not None:
        return cls(message, where=where, **facts)
    if kind in CODES:
        return Reported(kind, message, where=where, **facts)
    return EngineError(f"{kind}: {message}", where=where, **facts)


def told(error: BaseException) -> dict[str, str]:
    """An exception as a worker reports it."""
    if isinstance(error, Reported):
        return {"kind": error.kind, "message": error.what}
    for kind, cls in KINDS.items():
        if type(error) is cls:
            facts = {name: str(getattr(error, name)) for name in FACTS if getattr(error, name) is not None}
            return {"kind": kind, "message": error.what, **facts}
    return {"kind": type(error).__name__, "message": str(error)}
