"""Decode TOML files strictly by a schema; what is wrong is told by line, key and nearest right word."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

import msgspec

from prill_runtime.errors import PolicyError
from prill_runtime.files import refuse_pipe

T = TypeVar("T")
TABLE = re.compile(r"\s*\[+\s*gates\.(\"?)([^.\]\"]+)\1")
UNKNOWN = re.compile(r"unknown field `(?P<word>[^`]*)`|enum value '(?P<value>[^']*)'")
LAST_KEY = re.compile(r"(\w+)(\[[^\]]*\])*`$")


def load_toml(path: Path, schema: type[T], error: type[PolicyError] = PolicyError) -> T:
    """Decode `path` by `schema`; an unknown key is an error.

    Raises:
        error: unreadable, not TOML, or not as the schema asks; names the file, the line and the path inside.
    """
    try:
        refuse_pipe(path)
        text = path.read_text("utf-8")
        return msgspec.convert(tomllib.loads(text), schema, strict=True)
    except OSError as reason:
        raise error("cannot be read", where=str(path), got=reason.strerror) from reason
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as reason:
        raise error("not a TOML file", where=str(path), got=str(reason)) from reason
    except RecursionError:
        raise error("nested too deeply", where=str(path)) from None
    except msgspec.ValidationError as reason:
        where, hint = f"{path}{_place(text, schema, str(reason))}", _nearest(schema, str(reason))
        raise error(str(reason), where=where, hint=hint) from reason


def line_of(path: Path, words: str, gate: str = "") -> str:
    """`, line N` of the first line with these words in the tables of a gate, blanks aside; without words of
    the gate's first table; empty if there is none."""
    first, mine, inside = 0, 0, not gate
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        if gate and line.lstrip().startswith("["):
            table = TABLE.match(line)
            inside = table is not None and table[2] == gate
            first = first or (number if inside else 0)
        if inside and words.replace(" ", "") in line.replace(" ", ""):
            mine = mine or number
    found = mine if words else first
    return f", line {found}" if found else ""


def _place(text: str, schema: type[T], told: str) -> str:
    """`, line N` of the key that a sentence of msgspec is about.

    It says the key and not in which table; the line is the one without which the sentence is another.
    """
    unknown, last = UNKNOWN.search(told), LAST_KEY.search(told)
    key = (unknown["word"] if unknown else None) or (last[1] if last else "")
    lines = text.splitlines()
    found = [n for n, line in enumerate(lines) if key and re.match(rf"\s*\"?{re.escape(key)}\"?\s*=", line)]
    for number in found:
        without = "\n".join([*lines[:number], "", *lines[number + 1 :]])
        try:
            msgspec.convert(tomllib.loads(without), schema, strict=True)
        except tomllib.TOMLDecodeError:  # its value goes on in the next line
            continue
        except msgspec.ValidationError as other:
            if str(other) == told:
                continue
        return f", line {number + 1}"
    return f", line {found[0] + 1}" if found else ""


def _nearest(schema: type[T], told: str) -> str:
    """The word that was meant, of all keys or of all values of enumerations that the schema knows."""
    unknown = UNKNOWN.search(told)
    if unknown is None:
        return ""
    keys, values = set[str](), set[str]()
    for kind in _kinds(msgspec.inspect.type_info(schema)):
        if isinstance(kind, msgspec.inspect.StructType):
            keys |= {field.encode_name for field in kind.fields}
        elif isinstance(kind, msgspec.inspect.EnumType):
            values |= {str(member.value) for member in kind.cls}
    word, among = (unknown["word"], keys) if unknown["word"] else (unknown["value"] or "", values)
    near = get_close_matches(word, sorted(among), n=1)
    return f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(sorted(among))}"


def _kinds(kind: msgspec.inspect.Type) -> Iterator[msgspec.inspect.Type]:
    """A type and those it is made of."""
    yield kind
    inner: list[msgspec.inspect.Type] = [*getattr(kind, "types", ()), *getattr(kind, "item_types", ())]
    inner += [getattr(kind, name) for name in ("item_type", "value_type") if hasattr(kind, name)]
    if isinstance(kind, msgspec.inspect.StructType):
        inner += [field.type for field in kind.fields]
    for each in inner:
        yield from _kinds(each)
