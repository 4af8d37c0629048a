"""Decode TOML files strictly by a schema."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TypeVar

import msgspec

from prill_runtime.errors import PolicyError
from prill_runtime.files import refuse_pipe

T = TypeVar("T")


def load_toml(path: Path, schema: type[T], error: type[PolicyError] = PolicyError) -> T:
    """Decode `path` by `schema`; an unknown key is an error.

    Raises:
        error: unreadable, not TOML, or not as the schema asks; names the file and the path inside it.
    """
    try:
        refuse_pipe(path)
        return msgspec.convert(tomllib.loads(path.read_text("utf-8")), schema, strict=True)
    except OSError as reason:
        raise error("cannot be read", where=str(path), got=reason.strerror) from reason
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as reason:
        raise error("not a TOML file", where=str(path), got=str(reason)) from reason
    except RecursionError:
        raise error("nested too deeply", where=str(path)) from None
    except msgspec.ValidationError as reason:
        raise error(str(reason), where=str(path)) from reason
