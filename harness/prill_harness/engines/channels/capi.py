"""`capi:PATH.so`: an engine in a C library that exports the functions of prill_engine.h, in a process."""

from __future__ import annotations

import sys
from pathlib import Path

from prill_harness.engines.channels.process import Spoken, Worker
from prill_harness.engines.others.capi import build
from prill_harness.engines.remote import Channel, Remote, Target
from prill_runtime.errors import UsageError

MODULE = "prill_harness.engines.others.capi.worker"
EXAMPLE = "example"


class CApi(Remote, spec="capi"):
    """A library's path, or `example`: the small engine that prill brings. The library loads the model."""

    connector = "capi"
    takes = ("options",)

    @classmethod
    def library(cls, argument: str) -> Path:
        """The library that a spec names. Raises UsageError: no such file."""
        what = cls.target(argument).what
        path = build.example() if what == EXAMPLE else Path(what).expanduser().resolve()
        if not path.is_file():
            got = "a folder" if path.is_dir() else "no such file"
            raise UsageError(
                "no such library", where=repr(f"capi:{what}"), expected="a shared library", got=got
            )
        return path

    @classmethod
    def accepts(cls, argument: str) -> None:
        cls.library(argument)

    @classmethod
    def connect(cls, target: Target, path: str) -> Channel:
        library = cls.library(target.what)
        words = [sys.executable, "-P", "-m", MODULE, str(library), target.declared.get("options", "")]
        return Spoken(Worker(words, target.timeout, library.name), path, library.name)
