"""Requests to one server over HTTP, and everything that can go wrong with them as an error of its engine."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

import httpx2

from prill_harness.engines.channels.lines import error_of
from prill_harness.engines.others.capi.abi import CODES
from prill_runtime.errors import (
    ContextLengthExceeded,
    EngineError,
    InvalidParameter,
    MissingCapability,
    PrillError,
    UsageError,
)

TOKEN = "PRILL_TOKEN"
"""Environment variable of the bearer token; a spec is printed everywhere, so a token is never in it."""
LONGEST = 1 << 28  # bytes of one answer, or of one event
REFUSED = (0.1, 0.3, 1.0)  # seconds to wait before a refused connection is tried again
LOOK_S = 5.0  # seconds at most for a look at whether it answers
TOO_LONG = re.compile(r"context (size|length|window)|maximum.{0,20}length", re.IGNORECASE)


class Bounded:
    """A response that arrives in time and ends: as much of one as a reader of events needs."""

    def __init__(self, response: httpx2.Response, until: Callable[[], float]) -> None:
        self.headers, self.request = response.headers, response.request
        self._response, self._until = response, until

    def iter_text(self) -> Iterator[str]:
        """Pieces of the text as they arrive.

        Raises:
            ReadTimeout: time is up, though something may still be coming.
        """
        for piece in self._response.iter_text():
            if time.monotonic() > self._until():
                raise httpx2.ReadTimeout("time is up", request=self.request)
            yield piece

    def whole(self) -> str:
        """The text, at most LONGEST characters."""
        pieces, size = [], 0
        for piece in self.iter_text():
            size += len(piece)
            if size > LONGEST:
                raise httpx2.RemoteProtocolError(f"an answer of more than {LONGEST} characters")
            pieces.append(piece)
        return "".join(pieces)


class Link:
    """A server's address and how it is asked; thread-safe.

    Args:
        timeout: seconds for an answer, or for the next event of one.
        ended: what is known of the server's end, when a connection breaks.

    Only refused connections are tried again: any other request may have been carried out.
    """

    def __init__(self, url: str, timeout: float, ended: Callable[[], str] = lambda: "") -> None:
        self.name, self._timeout, self._ended = url, timeout, ended
        self._token = os.environ.get(TOKEN, "").strip()
        if not (self._token.isascii() and self._token.isprintable()):
            raise UsageError("bad token", where=TOKEN, expected="printable ASCII", got="something else")
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        address = httpx2.URL(url)
        # Certificates are the system's or SSL_CERT_FILE's; a proxy of the environment is for other machines.
        checked = httpx2.create_ssl_context() if address.scheme == "https" else False
        self._client = httpx2.Client(
            base_url=url,
            headers=headers,
            timeout=timeout,
            verify=checked,
            trust_env=not _is_here(address.host),
        )

    def hidden(self, text: object) -> str:
        """A text without the token, however a server or a log came to repeat it."""
        return str(text).replace(self._token, "***") if self._token else str(text)

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that the server answers to a POST of `body`, or to a GET.

        Raises:
            MissingCapability: there is no such path.
            ContextLengthExceeded, InvalidParameter: the server refuses the request.
            EngineError: the server cannot be reached, breaks off, is too slow, or answers something else.
        """
        until = time.monotonic() + self._timeout
        with self._asked(path, body) as response, self._blamed(path):
            return self._json(Bounded(response, lambda: until).whole(), path)

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """The JSON of each event that the server answers with, up to `[DONE]`; closing it cancels.

        Raises:
            As `ask`.
        """
        until = time.monotonic() + self._timeout
        with self._asked(path, body) as response, self._blamed(path):
            bounded = Bounded(response, lambda: until)
            for event in httpx2.EventSource(bounded, LONGEST):  # type: ignore[arg-type]
                if event.data == "[DONE]":
                    return
                said = self._json(event.data, path)
                if isinstance(said, Mapping) and "error" in said:
                    raise self._refusal(200, said, path)
                yield said
                until = time.monotonic() + self._timeout

    def status(self, path: str) -> int | None:
        """The status of a GET; None while nobody answers."""
        try:
            with self._client.stream(
                "GET", path, timeout=LOOK_S if self._timeout > LOOK_S else self._timeout
            ) as response:
                return response.status_code
        except httpx2.TransportError:
            return None

    def close(self) -> None:
        self._client.close()

    @contextmanager
    def _asked(self, path: str, body: Mapping[str, Any] | None) -> Iterator[httpx2.Response]:
        with self._blamed(path):
            response = self._sent(path, body)
        try:
            if not response.is_success:
                until = time.monotonic() + self._timeout
                with self._blamed(path):
                    text = Bounded(response, lambda: until).whole()
                raise self._refusal(response.status_code, text, path)
            yield response
        finally:
            response.close()

    def _sent(self, path: str, body: Mapping[str, Any] | None) -> httpx2.Response:
        if self._client.is_closed:
            raise EngineError("engine is closed", expected="an open engine", hint="open it again")
        # Escaped, so that a text that is no Unicode reaches the server as it is.
        content = None if body is None else json.dumps(body)
        request = self._client.build_request("GET" if body is None else "POST", path, content=content)
        for pause in REFUSED:
            try:
                return self._client.send(request, stream=True)
            except httpx2.ConnectError as error:
                if not _refused(error) or self._ended():
                    raise
                time.sleep(pause)
        return self._client.send(request, stream=True)

    @contextmanager
    def _blamed(self, path: str) -> Iterator[None]:
        """Whatever breaks on the way is the server's, in one sentence."""
        try:
            yield
        except httpx2.TimeoutException:
            raise self._broken(path, "no answer", f"one within {self._timeout:g} s", "none") from None
        except httpx2.ConnectError as error:
            raise self._broken(path, "cannot connect", "a server that listens", error) from None
        except (httpx2.TransportError, httpx2.DecodingError, httpx2.StreamError) as error:
            what = "the connection broke or carried no HTTP"
            raise self._broken(path, what, "a whole answer", error) from None

    def _json(self, text: str, path: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise self._broken(path, "an answer that is no JSON", "JSON", repr(text[:80])) from None

    def _broken(self, path: str, what: str, expected: str, got: object) -> EngineError:
        where = f"{self.name}{path}"
        return EngineError(
            what, where=where, expected=expected, got=self.hidden(got), hint=self.hidden(self._ended())
        )

    def _refusal(self, status: int, said: Any, path: str) -> PrillError:
        """The error that the server's refusal is, with its own words."""
        kind, message = _words(said)
        words, where = self.hidden(message)[:300], f"{self.name}{path}"
        if kind in CODES:  # an engine behind prill_engine.h, or whoever names its kinds alike
            return error_of({"kind": kind, "message": words}, where)
        if status in (404, 405, 501):
            return MissingCapability(f"the server does not offer {path}", where=self.name, got=status)
        if status in (401, 403):
            hint = f"the token is read from {TOKEN}"
            return EngineError("the server wants another token", where=where, got=words, hint=hint)
        if 300 <= status < 400:
            return EngineError(
                "the server sends elsewhere, where no token is sent", where=where, got=status,
                hint="give the address that it names",
            )  # fmt: skip
        if kind == "exceed_context_size_error" or (status == 400 and TOO_LONG.search(message)):
            return ContextLengthExceeded(words, where=where)
        if 400 <= status < 500:
            return InvalidParameter(words, where=where, got=status)
        return EngineError(f"status {status}: {words}", where=where, hint=self.hidden(self._ended()))


def _words(said: Any) -> tuple[str, str]:
    """Kind and message of an error's body, whichever of the common forms it has."""
    if isinstance(said, str):
        try:
            said = json.loads(said)
        except (ValueError, RecursionError):
            return "", said.strip() or "no message"
    inner = said.get("error", said) if isinstance(said, Mapping) else said
    if not isinstance(inner, Mapping):
        return "", str(inner)
    return str(inner.get("kind") or inner.get("type", "")), str(
        inner.get("message") or inner.get("detail") or inner
    )


def _refused(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
