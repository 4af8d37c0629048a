"""`http:URL`: a server that is running already."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped]

from prill_harness.engines.remote import Channel, Remote, Target
from prill_runtime.errors import EngineError, UsageError
from prill_runtime.gguf.file import open_gguf
from prill_runtime.tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from prill_harness.engines.channels.link import Link

LOADING = 600.0  # seconds for a server to be healthy
POLL = 0.05  # seconds between two looks at its health
BUSY = 503  # what servers answer while they load


class Http(Remote, spec="http"):
    """A running server, by its address; `http://HOST:PORT` is a spec by itself."""

    connector = "http"
    takes = ("ctx", "model", "pid")
    has_model = True

    @classmethod
    def target(cls, argument: str) -> Target:
        # Looked at before anything else, whose errors would repeat it.
        if re.search(r"//[^/]*@|[?#]", argument):
            raise UsageError(
                "an address with a user, a password or a query in it", where=f"{cls.connector}:",
                expected="http://HOST[:PORT][/PATH]", hint="a token is read from PRILL_TOKEN",
            )  # fmt: skip
        return super().target(argument)

    @classmethod
    def accepts(cls, argument: str) -> None:
        target = cls.target(argument)
        cls.address(target)
        pid = target.declared.get("pid")
        if pid is not None and not psutil.pid_exists(int(pid)):
            raise UsageError("bad pid", where=repr(argument), expected="a running process", got=pid)

    @classmethod
    def address(cls, target: Target) -> str:
        """The server's URL, without the `/v1` that some write behind it.

        Raises:
            UsageError: no such URL.
        """
        url = f"{cls.connector}:{target.what}" if target.what.startswith("//") else target.what
        try:
            parts = urlsplit(url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            sound = False
        if not sound or re.search(r"[\s,]", url):
            raise UsageError(
                "bad address", where=repr(f"{cls.connector}:{target.what}"),
                expected=f"http://HOST[:PORT][/PATH]; options: {', '.join(cls.takes)}, arithmetic, timeout",
                got=repr(target.what),
            )  # fmt: skip
        return url.rstrip("/").removesuffix("/v1")

    @classmethod
    def connect(cls, target: Target, path: str) -> Channel:
        from prill_harness.engines.channels.link import Link

        pid = target.declared.get("pid")
        link = Link(cls.address(target), target.timeout)
        return opened(link, target, path, None if pid is None else int(pid))


class Https(Http, spec="https"):
    """As `http`, by an address that begins with https."""

    connector = "https"


def opened(
    link: Link, target: Target, path: str, pid: int | None, healthy: Callable[[], bool] | None = None
) -> Channel:
    """The channel to a server once it has loaded its model; the link is closed if there is none.

    Args:
        healthy: waits until somebody answers; None: somebody does.
    """
    from prill_harness.engines.channels.dialects import connected

    try:
        until = time.monotonic() + LOADING
        while (status := link.status("/health")) == BUSY or (status is None and healthy and healthy()):
            if time.monotonic() > until:
                raise EngineError(
                    "the server is not healthy", where=link.name, expected=f"health within {LOADING:g} s"
                )
            time.sleep(POLL)
        with open_gguf(path) as file:
            tokenizer = load_tokenizer(file.metadata)
        return connected(link, target, tokenizer, pid)
    except BaseException:
        link.close()
        raise
