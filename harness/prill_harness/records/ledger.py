"""The ledger: one JSONL line per record, each with a digest of all the lines before it.

A cell's records form one chain: editing, dropping, repeating or moving a record breaks it, whatever file the
chain is in. That detects accidents and edits by hand; it does not stop anybody who recomputes the digests
(docs/SECURITY.md).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from prill_harness.records.evidence import (
    EXIT_CODES,
    SCHEMA,
    CauseFound,
    Cell,
    CellEnded,
    CellStarted,
    Evidence,
    Record,
    Status,
    badness,
)
from prill_runtime.errors import LedgerError
from prill_runtime.files import refuse_pipe

LINE = re.compile(rb'(\{.*),"digest":"([0-9a-f]{32})"\}', re.DOTALL)

_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def encode(record: Record) -> bytes:
    """A record as JSON.

    Raises:
        TypeError, ValueError, OverflowError, msgspec.MsgspecError: a value that JSON cannot express.
    """
    return msgspec.json.encode(record)


def decode(text: bytes | str) -> Record:
    """Decode a record from JSON.

    Raises:
        msgspec.ValidationError: no record of this version. msgspec.DecodeError, RecursionError: not JSON.
    """
    return _decoder.decode(text)


class Chain:
    """The state of every cell's chain: the digest that its next record must follow."""

    def __init__(self) -> None:
        self._last: dict[Cell, str] = {}

    def seal(self, record: Record) -> bytes:
        """The record's line, with the newline."""
        body = encode(record)
        self._last[record.cell] = digest = self._digest(record.cell, body)
        return body[:-1] + f',"digest":"{digest}"}}\n'.encode()

    def follow(self, line: bytes, where: str) -> Record | None:
        """The record of a line; None for a partial line left by a killed writer.

        Raises:
            LedgerError: it is no record of this version, or does not follow the lines before it.
        """
        match = LINE.fullmatch(line)
        if match is None:
            return self._torn(line, where)
        body = match[1] + b"}"
        try:
            record = decode(body)
        except msgspec.ValidationError as error:
            raise LedgerError("not a record of this version", where=where, got=str(error)) from error
        except (msgspec.DecodeError, RecursionError):
            raise LedgerError("ledger line is not JSON", where=where, got=repr(line[:40])) from None
        digest = self._digest(record.cell, body)
        if match[2].decode() != digest:
            raise LedgerError(
                "the ledger was altered: a record does not follow from those before it",
                where=f"{where}, {record.cell.id}",
                expected=f"digest {digest}",
                got=match[2].decode(),
                hint="run the cell again",
            )
        self._last[record.cell] = digest
        return record

    @staticmethod
    def _torn(line: bytes, where: str) -> None:
        """Accept the beginning of a record, as a killed writer leaves it: JSON wrong at its end only."""
        try:
            msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            if "truncated" in str(error) or str(error).endswith(f"(byte {len(line)})"):
                return
            raise LedgerError("ledger line is not JSON", where=where, got=repr(line[:40])) from None
        raise LedgerError("a record without its digest", where=where, got=repr(line[:40]))

    def _digest(self, cell: Cell, body: bytes) -> str:
        return hashlib.sha256(self._last.get(cell, "").encode() + b"\n" + body).hexdigest()[:32]


class Ledger:
    """Append-only JSONL file; every record is synced to disk before `append` returns."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._chain = _read(self.path)[1] if self.path.exists() else Chain()
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._end_torn_line()

    def _end_torn_line(self) -> None:
        """End the partial line that a killed writer may have left, so that the next record has its own."""
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            os.write(self._fd, b"\n")

    def append(self, record: Record) -> None:
        """Write one record and fsync; O_APPEND keeps the lines of concurrent writers whole.

        Raises:
            LedgerError: it cannot be written.
        """
        line = memoryview(self._chain.seal(record))
        try:
            while line:
                line = line[os.write(self._fd, line) :]
            os.fsync(self._fd)
        except OSError as error:
            raise LedgerError("cannot write a record", where=str(self.path), got=error.strerror) from None

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def lines(records: Iterable[Record]) -> bytes:
    """A whole ledger of these records, as bytes."""
    chain = Chain()
    return b"".join(map(chain.seal, records))


def read(path: str | Path) -> tuple[Record, ...]:
    """All records of a ledger in order, without lines torn by a hard kill.

    Raises:
        LedgerError: a line is not a record of this version, or was altered.
    """
    return tuple(_read(Path(path))[0])


def audited(path: str | Path) -> tuple[Record, ...]:
    """As `read`, for a ledger from elsewhere or from an earlier run: its records must also agree.

    Raises:
        LedgerError: as `read`; or the schema or an exit code contradicts the evidence.
    """
    records = read(path)
    _agree(records, path)
    return records


def _read(path: Path) -> tuple[list[Record], Chain]:
    chain, records = Chain(), list[Record]()
    try:
        refuse_pipe(path)
        content = path.read_bytes()
    except OSError as error:
        raise LedgerError("cannot be read", where=str(path), got=error.strerror) from None
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip() and (record := chain.follow(line, f"{path} line {number}")) is not None:
            records.append(record)
    return records, chain


def _agree(records: Iterable[Record], path: str | Path) -> None:
    """Check that every cell's schema and exit code agree with its evidence; the gate compares with the plan.

    Raises:
        LedgerError: they do not.
    """
    seen: dict[tuple[Cell, int], set[Status]] = {}
    for record in records:
        if isinstance(record, CauseFound):
            continue
        problem: tuple[object, object] | None = None
        attempt = record.cell, record.attempt
        if isinstance(record, CellStarted) and record.schema != SCHEMA:
            problem = f"schema {SCHEMA}", record.schema
        if isinstance(record, Evidence):
            seen.setdefault(attempt, set()).add(record.status)
        if isinstance(record, CellEnded) and attempt in seen:
            worst = EXIT_CODES[min(seen[attempt], key=badness)]
            if worst and not record.exit_code:  # the exit code is the process's, which cells may share
                problem = f"exit code {worst}", record.exit_code
        if problem:
            raise LedgerError(
                "the ledger contradicts itself",
                where=f"{path}, {record.cell.id}",
                expected=problem[0],
                got=problem[1],
                hint="run the cell again",
            )
