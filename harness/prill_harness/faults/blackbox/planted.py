"""Plant a changed file or a spoiled answer in any engine, by the fault's name in its spec."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from prill_harness.engines.base import Engine
from prill_harness.engines.models import resolve_model
from prill_harness.faults.blackbox.answers import ANSWERS, Answer
from prill_harness.faults.blackbox.changed import Change, planted
from prill_harness.faults.blackbox.changes import CHANGES
from prill_harness.faults.blackbox.through import Through
from prill_runtime.errors import UsageError
from prill_runtime.gguf.file import open_gguf

ALL: tuple[Change | Answer, ...] = (*CHANGES, *ANSWERS)
BLACKBOX = {fault.name: fault for fault in ALL}
"""Every fault that any engine can have planted, by name."""


def own(names: Iterable[str]) -> tuple[str, ...]:
    """Those of the names that are not of this table, but of prill's own code."""
    return tuple(name for name in names if name not in BLACKBOX)


def changes(names: Iterable[str]) -> tuple[Change, ...]:
    return tuple(fault for name in names if isinstance(fault := BLACKBOX.get(name), Change))


def copied(wanted: Sequence[Change], model: str | Path, stack: ExitStack) -> Path:
    """The model's file with all of these changes, which is gone when the stack is closed.

    Raises:
        UsageError: the file has nothing that one of them changes.
    """
    path = resolve_model(str(model))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prill-changed-")))
    for change in wanted:
        made = planted(change, path, folder)
        if made is None:
            raise UsageError(
                "the file has nothing that this fault changes", where=str(model), expected="another model",
                got=f"{change.name} ({change.summary.lower()})",
            )  # fmt: skip
        path = made
    return path


def opened(
    names: Sequence[str], open_it: Callable[[str | Path], Engine], model: str | Path, *, has_model: bool
) -> Engine:
    """An engine with these faults; without any, just the engine.

    Args:
        names: faults; those of prill's own code are left to the caller.
        has_model: the engine has its file already, so a changed one is for its judge.
    """
    spoiled = [fault for name in names if isinstance(fault := BLACKBOX.get(name), Answer)]
    wanted = () if has_model else changes(names)
    if not (spoiled or wanted):
        return open_it(model)
    with ExitStack() as stack:
        with open_gguf(resolve_model(str(model))) as file:
            size = len(file.metadata["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
            context = file.metadata[f"{file.architecture}.context_length"]
            told = {"model": str(model), "model_sha256": file.sha256}
        inner = open_it(copied(wanted, model, stack) if wanted else model)
        engine: Engine = Through(inner, told=told, ends=stack.pop_all().close)
    context = int(str(inner.info.config.get("served_context", context)))
    for answer in spoiled:
        engine = Through(engine, vocabulary=size, context=context, **answer.spoils)
    return engine
