"""A TOML file and the schema it owes in; the decoded struct, or one sentence naming file and path, out."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TypeVar

import msgspec

from prill_runtime.errors import PolicyError

T = TypeVar("T")


def load_toml(path: Path, schema: type[T]) -> T:
    """Decode `path` by `schema`; a key the schema does not know is an error.

    Raises:
        PolicyError: not readable, not TOML, or not what the schema asks for.
    """
    try:
        return msgspec.convert(tomllib.loads(path.read_text("utf-8")), schema, strict=True)
    except OSError as error:
        raise PolicyError("cannot be read", where=str(path), got=error.strerror) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PolicyError("not a TOML file", where=str(path), got=str(error)) from error
    except msgspec.ValidationError as error:
        raise PolicyError(str(error), where=str(path)) from error
