"""Engines that other people wrote, reached by a channel and behind the engine protocol."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import psutil  # type: ignore[import-untyped]
from numpy.typing import NDArray

from prill_harness.engines.base import Capability, Engine, EngineInfo, Generation
from prill_harness.engines.models import resolve_model
from prill_harness.records.names import look_up
from prill_runtime.errors import EngineError, MissingCapability, UsageError
from prill_runtime.gguf.file import open_gguf
from prill_runtime.sampling.sampler import SamplingParams

OnToken = Callable[[int, float], bool | None]
ARITHMETIC = ("float64", "float32", "half", "int8", "unknown")
FINISHED = ("eos", "length", "stop", "context", "cancelled")
CALLS: Mapping[str, Capability] = {
    "tokenize": Capability.TOKENIZE,
    "logits": Capability.LOGITS,
    "generate": Capability.GENERATE,
    "trace": Capability.TRACE,
}
"""Calls of an engine, and the capability that answering each implies; `detokenize` belongs to `tokenize`."""

OPTIONS: Mapping[str, tuple[str, str, str]] = {
    "arithmetic": ("", "NAME", ""),
    "timeout": (r"(?=.*[1-9])\d{1,6}(\.\d+)?", "SECONDS", "seconds above 0"),
    "ctx": (r"[1-9]\d{0,8}", "POSITIONS", "positions above 0"),
    "pid": (r"[1-9]\d{0,8}", "PID", "the id of a process"),
    "model": (r".+", "NAME", "a model's name"),
    "log": (r".+", "FILE", "a file's path"),
    "options": (r".*", "NAME=VALUE;…", "options of the library"),
    "adapter": (r"text", "text", "text"),
    "skip": (r"\d{1,4}", "LINES", "lines before the text"),
}
"""What a spec may declare: the pattern of its value, and how a sentence calls it."""


@dataclass(frozen=True)
class Hello:
    """What an engine says of itself when it is opened.

    Attributes:
        calls: the names of the calls that it answers.
        arithmetic: one of ARITHMETIC; "unknown" if it does not say.
        config: the effective configuration, by the runtime's names.
        draws: "philox" if a seed gives the draws that prill's own sampler makes of it, else "own".
        pid: the process that computes; None: this one, or unknown.
        at_once: requests that may be on their way at one time.
    """

    name: str
    calls: frozenset[str]
    version: str = "unknown"
    device: str = "unknown"
    arithmetic: str = "unknown"
    config: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    draws: str = "philox"
    pid: int | None = None
    at_once: int = 1


@dataclass(frozen=True)
class Reply(Generation):
    """What an engine wrote, as far as it tells: reading a field that it does not tell is MissingCapability.

    Attributes:
        text: the text, where the engine gives one.
        top: natural logprobs by id at each position, of the raw logits, as many as the engine tells.
    """

    text: str | None = None
    top: tuple[Mapping[int, float], ...] = ()
    engine: str = ""

    @classmethod
    def of(cls, **told: Any) -> Reply:
        """An answer with these fields alone."""
        answer = object.__new__(cls)
        for name, value in told.items():
            object.__setattr__(answer, name, value)
        return answer

    def __getattr__(self, name: str) -> Any:
        if name in ("ids", "logprobs"):
            raise MissingCapability(f"engine {self.engine} does not tell the {name} of what it writes")
        raise AttributeError(name)


class Channel(Protocol):
    """A connection to one loaded model, which answers calls."""

    @property
    def hello(self) -> Hello: ...

    def call(self, name: str, arguments: Mapping[str, Any], on_token: OnToken | None = None) -> Any:
        """The answer of one call.

        Args:
            on_token: called with every (id, logprob) as it is generated; returning False cancels.

        Raises:
            PrillError: the error that the engine reports; MissingCapability if there is no such call.
        """
        ...

    def close(self) -> None:
        """Release the engine; calling it twice is harmless."""
        ...


@dataclass(frozen=True)
class Target:
    """The parsed argument of a connector, `WHAT[,key=value]...`.

    Attributes:
        what: a class, a command or an address.
        arithmetic: the engine's, as the user declares it; None: as the engine says.
        timeout: seconds that one call may take.
        declared: the connector's other options, as they were given.
    """

    what: str
    arithmetic: str | None = None
    timeout: float = 120.0
    declared: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, connector: str, argument: str, takes: Sequence[str] = ()) -> Target:
        """Parse from the end, so that a command may contain commas.

        Args:
            takes: further options of the connector, of OPTIONS.

        Raises:
            UsageError: only options, or an invalid value.
        """
        names = ("arithmetic", "timeout", *takes)
        options: dict[str, str] = {}
        what = argument
        while found := re.fullmatch(rf"(.*),({'|'.join(names)})=([^,]*)", what, re.DOTALL):
            what, key, value = found.groups()
            options.setdefault(key, value)
        if not what.strip():
            raise UsageError(
                "engine spec is incomplete", where=repr(f"{connector}:{argument}"),
                expected=f"{connector}:WHAT{''.join(f'[,{name}={OPTIONS[name][1]}]' for name in names)}",
                got=repr(argument),
            )  # fmt: skip
        for name, value in options.items():
            pattern, _, expected = OPTIONS[name]
            if name == "arithmetic":
                look_up(value, ARITHMETIC, "unknown arithmetic", where=repr(argument))
            elif not re.fullmatch(pattern, value):
                raise UsageError(f"bad {name}", where=repr(argument), expected=expected, got=repr(value))
        arithmetic, seconds = options.pop("arithmetic", None), options.pop("timeout", "120")
        return cls(what, arithmetic, float(seconds), options)


class Remote(Engine):
    """Anything that answers calls on a channel, as an Engine.

    The form of every answer is checked here; its numbers are for the checks to judge.
    """

    connector: ClassVar[str]
    takes: ClassVar[tuple[str, ...]] = ()
    """What its spec may declare beside arithmetic and timeout, of OPTIONS."""
    has_model: ClassVar[bool] = False
    """Whether it has its model already, whatever file it is opened with."""

    def __init__(self, channel: Channel, target: Target, model: str) -> None:
        self._channel, hello = channel, channel.hello
        with open_gguf(resolve_model(model)) as file:
            sha256 = file.sha256
        self._where = hello.name
        offered = {offers for call, offers in CALLS.items() if call in hello.calls}
        if hello.at_once > 1 and Capability.GENERATE in offered:
            offered.add(Capability.BATCH)
        self._info = EngineInfo(
            name=hello.name,
            version=hello.version,
            device=hello.device,
            model=model,
            model_sha256=sha256,
            arithmetic=target.arithmetic or hello.arithmetic,
            capabilities=frozenset(offered),
            config=dict(hello.config),
            draws=hello.draws,
        )

    @classmethod
    def connect(cls, target: Target, path: str) -> Channel:
        """Load the model at `path`, and return the channel to it."""
        raise NotImplementedError

    @classmethod
    def target(cls, argument: str) -> Target:
        """The parsed argument of a spec. Raises UsageError for one that cannot be."""
        return Target.parse(cls.connector, argument, cls.takes)

    @classmethod
    def open(cls, argument: str, model: str) -> Engine:
        target = cls.target(argument)
        channel = cls.connect(target, str(resolve_model(model)))
        try:
            return cls(channel, target, model)
        except BaseException:
            channel.close()
            raise

    @property
    def info(self) -> EngineInfo:
        return self._info

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        return self._ids("tokenize", self._call("tokenize", {"text": text, "add_special": add_special}))

    def detokenize(self, ids: Sequence[int]) -> bytes:
        text = self._call("detokenize", {"ids": list(ids)})
        if isinstance(text, bytes):
            return text
        if isinstance(text, str):
            return text.encode("utf-8", "surrogateescape")
        raise self._odd("detokenize", "bytes or text", type(text).__name__)

    def logits(self, ids: Sequence[int]) -> NDArray[np.floating]:
        rows = self._array("logits", self._call("logits", {"ids": list(ids)}))
        if rows.ndim != 2 or len(rows) != len(ids):
            raise self._odd("logits", f"({len(ids)}, vocabulary) numbers", str(rows.shape))
        return rows

    def generate(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        on_token: OnToken | None = None,
        **sampling: Any,
    ) -> Generation:
        arguments = dict(
            ids=list(ids), max_tokens=max_tokens, stop=list(stop), ignore_eos=ignore_eos, **sampling
        )
        made = self._call("generate", arguments, on_token)
        if not isinstance(made, Mapping):
            fields = ("ids", "logprobs", "finish_reason", "end_id", "text", "top")
            made = {name: getattr(made, name) for name in fields if hasattr(made, name)}
        reason, end, text = made.get("finish_reason"), made.get("end_id"), made.get("text")
        if reason not in FINISHED:
            raise self._odd("generate", f"a finish_reason of {', '.join(FINISHED)}", repr(reason))
        if text is not None and not isinstance(text, str):
            raise self._odd("generate", "a text", repr(text)[:80])
        told: dict[str, Any] = {"finish_reason": reason, "text": text, "engine": self._where}
        if "ids" not in made and text is not None:
            return Reply.of(**told)
        written = tuple(self._ids("generate", made.get("ids")))
        told |= {"ids": written, "end_id": None if end is None else int(end)}
        if "logprobs" in made:
            logprobs = self._array("generate", made["logprobs"])
            if logprobs.shape != (len(written),):
                raise self._odd("generate", f"a logprob for each of {len(written)} ids", str(logprobs.shape))
            told["logprobs"] = tuple(map(float, logprobs))
        return Reply.of(**told, top=self._top(made.get("top") or (), len(written)))

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        ignore_eos: bool = False,
        sampling: Sequence[SamplingParams] = (),
    ) -> list[Generation]:
        """As of Engine; requests really are on their way at one time, where the engine can (`at_once`)."""
        drawn = sampling or [SamplingParams()] * len(prompts)

        def one(ids: Sequence[int], params: SamplingParams) -> Generation:
            return self.generate(ids, max_tokens=max_tokens, ignore_eos=ignore_eos, **asdict(params))

        with ThreadPoolExecutor(self._channel.hello.at_once, "prill request") as pool:
            made = [pool.submit(one, ids, each) for ids, each in zip(prompts, drawn, strict=True)]
            return [each.result() for each in made]

    def _top(self, top: Any, count: int) -> tuple[Mapping[int, float], ...]:
        """The best ids' logprobs at each position, given as mappings or as pairs (id, logprob)."""
        try:
            found = tuple({int(token): float(value) for token, value in dict(row).items()} for row in top)
        except (TypeError, ValueError):
            raise self._odd("generate", "a list of (id, logprob) for each id", repr(top)[:80]) from None
        if len(found) not in (0, count):
            raise self._odd("generate", f"top logprobs for each of {count} ids", str(len(found)))
        return found

    def watched(self) -> Mapping[str, int]:
        """Resident bytes, threads and open descriptors of the engine's process and its children, now.

        Raises:
            MissingCapability: the process is not known, or is over.
        """
        pid = self._channel.hello.pid
        if pid is None:
            raise MissingCapability(
                f"the process of engine {self._where} is not known", hint="declare it with pid="
            )
        try:
            family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            return {
                "resident": sum(member.memory_info().rss for member in family),
                "threads": sum(member.num_threads() for member in family),
                "descriptors": sum(member.num_fds() for member in family),
            }
        except psutil.Error as error:
            raise MissingCapability(f"the process of engine {self._where} cannot be read: {error}") from None

    def trace(
        self, ids: Sequence[int], replace: Mapping[str, NDArray[np.float64]] | None = None
    ) -> Iterator[tuple[str, NDArray[np.floating]]]:
        if replace is not None:
            self._lacks(Capability.REPLACE)
        stages = self._call("trace", {"ids": list(ids)})
        pairs = stages.items() if isinstance(stages, Mapping) else stages
        for name, array in pairs:
            yield str(name), self._array("trace", array)

    def close(self) -> None:
        self._channel.close()

    def _call(self, name: str, arguments: Mapping[str, Any], on_token: OnToken | None = None) -> Any:
        if name not in self._channel.hello.calls:
            raise MissingCapability(f"engine {self._where} does not offer {name}")
        return self._channel.call(name, arguments, on_token)

    def _ids(self, call: str, answer: Any) -> list[int]:
        try:
            ids = np.asarray(answer)
        except ValueError:
            ids = np.empty(())
        if ids.ndim != 1 or (len(ids) and not np.issubdtype(ids.dtype, np.integer)):
            raise self._odd(call, "a list of token ids", repr(answer)[:80])
        return [int(each) for each in ids]

    def _array(self, call: str, answer: Any) -> NDArray[np.floating]:
        """An array in the precision in which it came; Python's own numbers as float64."""
        try:
            array = np.asarray(answer)
            return array if np.issubdtype(array.dtype, np.floating) else array.astype(np.float64)
        except (TypeError, ValueError):
            raise self._odd(call, "numbers", repr(answer)[:80]) from None

    def _odd(self, call: str, expected: str, got: str) -> EngineError:
        return EngineError(
            "an answer of the wrong form", where=f"{self._where}, {call}", expected=expected, got=got
        )
