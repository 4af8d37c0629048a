"""Change the TOML files that people write, and leave their comments and their order as they are."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
import tomlkit
from tomlkit.items import AoT

from prill_harness.records.files import write_file


def create(file: Path, struct: msgspec.Struct) -> None:
    """Write a struct as a new file, with what is empty in it for a person to fill."""
    write_file(file, tomlkit.dumps(_plain(struct)))


def change(file: Path, **values: object) -> None:
    """Set keys of a file; a struct becomes a table."""
    document = tomlkit.parse(file.read_text("utf-8"))
    for key, value in values.items():
        document[key] = _plain(value) if isinstance(value, msgspec.Struct) else value
    write_file(file, tomlkit.dumps(document))


def add_table(file: Path, key: str, struct: msgspec.Struct) -> None:
    """Write a struct behind the tables of an array, `[[key]]`, of a file that may not be there yet."""
    document = tomlkit.parse(file.read_text("utf-8") if file.exists() else "")
    tables = document.get(key)
    if not isinstance(tables, AoT):
        rows = [dict(row) for row in tables or ()]  # `key = []`, which may stand there until the first
        document.pop(key, None)
        tables = tomlkit.aot()
        for row in rows:
            tables.append(tomlkit.item(row))
        document.append(key, tables)
    tables.append(tomlkit.item(_plain(struct)))
    write_file(file, tomlkit.dumps(document))


def drop_tables(file: Path, key: str, ids: Collection[str]) -> None:
    """Take the tables of these ids out of an array of a file."""
    document = tomlkit.parse(file.read_text("utf-8"))
    tables: Any = document[key]
    for at in reversed(range(len(tables))):
        if tables[at]["id"] in ids:
            del tables[at]
    if not tables:
        document[key] = tomlkit.array()
    write_file(file, tomlkit.dumps(document))


def _plain(struct: object) -> Any:
    """Fields by name, dates as they are; without what is None, and without what is empty in a table."""
    found = msgspec.to_builtins(struct, builtin_types=(dt.date,))
    return {name: _filled(value) for name, value in found.items() if value is not None}


def _filled(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _filled(inner) for name, inner in value.items() if inner not in ("", [], None)}
