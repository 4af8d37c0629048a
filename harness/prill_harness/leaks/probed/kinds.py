"""An engine in; one small call of every kind its protocol knows, and of every way a call ends, out.

Each is a site at which memory may be left. They are made small, so that thousands are affordable: a leak in
one request of two hundred shows as well as one in each. So every round calls each entry point of the
protocol, but for loads of a whole model.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prill_harness.engines.base import Capability, Engine
from prill_runtime.errors import Inconclusive, NotANumber
from prill_runtime.run.model import Model
from prill_runtime.sampling.sampler import SamplingParams

TEXT = "caf\u00e9 of the quick \U0001f9ea fox, 3.14"
HEAD_BYTES = 8 << 20  # bytes in which the edited names of a file have to lie
NAMES = ("output_norm.weight", "tokenizer.ggml.model")  # a tensor, and a key that is read after all tensors
ARCHITECTURE = b"general.architecture\x08\0\0\0"
TRIED_PROMPTS = 64  # prompts, to find a text to stop at
HOT, SEEDS, SEARCH_S = 3.0, 3000, 5.0  # a draw that ends at once: its temperature, most seeds and seconds
COPIED_BYTES = 64 << 20  # bytes of a model of which a poisoned copy is made
DRAWN = (
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 0.7, "repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"temperature": 1.0},
)
REFUSED: tuple[dict[str, Any], ...] = (
    {"temperature": -1.0},
    {"top_p": 1.5},
    {"top_k": -1},
    {"repetition_penalty": 0.0},
    {"max_tokens": -1},
    {"stop": ("",)},
)


@dataclass
class CallSubject:
    """What the calls are made on.

    Attributes:
        vocab, context: 0 where the engine does not tell. reopen: opens this engine on a file.
        stops: a prompt, and a text in what follows it. seed: with which the end token is drawn first.
        files: those that are refused. poisoned: the engine on a file whose last weights are not numbers.
    """

    engine: Engine
    reopen: Callable[[str], Engine]
    model: str
    vocab: int = 0
    context: int = 0
    stops: tuple[list[int], str] = ([], "")
    seed: int | None = None
    files: list[str] = field(default_factory=list)
    poisoned: Engine | None = None

    def offers(self, *needed: Capability) -> bool:
        return set(needed) <= self.engine.info.capabilities


Call = Callable[[CallSubject, int], object]
KINDS: dict[str, tuple[Call, tuple[Capability, ...]]] = {}


def kind(*needs: Capability) -> Callable[[Call], Call]:
    """Register a kind of call under its function's name; its second argument counts the calls from 0."""

    def register(call: Call) -> Call:
        KINDS[call.__name__] = call, needs
        return call

    return register


@kind(Capability.GENERATE)
def greedy(s: CallSubject, n: int) -> None:
    """To no token, one or two; with and without a stop string that is not met."""
    stop = ("\u00e9\u00e8 never",) if n % 4 == 1 else ()
    s.engine.generate([1], max_tokens=n % 3, ignore_eos=n % 2 == 0, stop=stop)


@kind(Capability.GENERATE)
def sampled(s: CallSubject, n: int) -> None:
    s.engine.generate([1, 2], max_tokens=1, seed=n, ignore_eos=True, **DRAWN[n % len(DRAWN)])  # type: ignore[arg-type]


@kind(Capability.GENERATE, Capability.TOKENIZE)
def stopped(s: CallSubject, n: int) -> None:
    """At a string: the first of several, or the last."""
    prompt, text = s.stops
    stop = (text, "\u00e9\u00e8 never") if n % 2 else ("never this one", text)
    done = s.engine.generate(prompt, max_tokens=4, ignore_eos=True, stop=stop)
    if done.finish_reason != "stop":
        raise Inconclusive("the request did not stop at its string", got=done.finish_reason)


@kind(Capability.GENERATE)
def ended(s: CallSubject, n: int) -> None:
    """By the end token; alone, and in a batch beside a text that goes on."""
    hot = SamplingParams(temperature=HOT, seed=s.seed or 0)
    if n % 3:
        s.engine.generate([1], max_tokens=1, temperature=hot.temperature, seed=hot.seed)
    elif s.offers(Capability.BATCH):
        s.engine.generate_batch([[1], [2]], max_tokens=2, sampling=[hot, SamplingParams()])


@kind(Capability.GENERATE)
def poisoned(s: CallSubject, n: int) -> None:
    """By logits that are no numbers; in one round of three."""
    with refusing():
        if n % 3 == 0 and s.poisoned is not None:
            s.poisoned.generate([1], max_tokens=1)


@kind(Capability.GENERATE)
def cancelled(s: CallSubject, n: int) -> None:
    """By an answer, or by a callback that raises."""

    def answer(token: int, logprob: float) -> bool:
        if n % 2:
            raise KeyError(token)
        return False

    with contextlib.suppress(KeyError):
        s.engine.generate([1], max_tokens=3, ignore_eos=True, on_token=answer)


@kind(Capability.GENERATE)
def filled(s: CallSubject, n: int) -> None:
    """To the last position of the context, where that is told and short; in every other round."""
    if n % 2:
        return
    length = s.context - 1 if 2 < s.context <= 64 else 2
    s.engine.generate([n % 3] * length, max_tokens=4, ignore_eos=True)


@kind(Capability.GENERATE, Capability.BATCH)
def batched(s: CallSubject, n: int) -> None:
    """Of prompts that differ, greedy and drawn, ended together or not."""
    drawn = [SamplingParams(), SamplingParams(temperature=1.0, seed=n)] if n % 3 else ()
    s.engine.generate_batch([[1], [2, 3]], max_tokens=1 + n % 2, ignore_eos=n % 5 > 0, sampling=drawn)


@kind(Capability.GENERATE, Capability.BATCH)
def batch_refused(s: CallSubject, n: int) -> None:
    """For one prompt of several."""
    with refusing():
        s.engine.generate_batch([[1], []], max_tokens=1)


@kind(Capability.GENERATE)
def refused(s: CallSubject, n: int) -> None:
    """For a parameter, no id, an id outside the vocabulary, too many ids."""
    bad: list[dict[str, Any]] = [*REFUSED, {"ids": []}, {"ids": [1, s.vocab or 2**31 - 1]}]
    if 0 < s.context <= 8192 and n % 9 == 8:
        bad = [{"ids": [1] * (s.context + 1)}]
    with refusing():
        s.engine.generate(**{"ids": [1], "max_tokens": 1, **bad[n % len(bad)]})


@kind(Capability.SESSIONS)
def held(s: CallSubject, n: int) -> None:
    """A session: fed, reset, fed again, overfed, closed."""
    session = s.engine.session(2)
    try:
        session.feed([1])
        if n % 2:
            session.reset()
        with refusing():
            session.feed([1, 2, 3])
        _ = session.length
        session.reset()
    finally:
        session.close()


@kind(Capability.TOKENIZE)
def spelled(s: CallSubject, n: int) -> None:
    ids = s.engine.tokenize(TEXT, add_special=n % 2 == 0)
    s.engine.detokenize(ids)
    model = getattr(s.engine, "model", None)
    if isinstance(model, Model):  # whose texts are also streamed
        stream = model.tokenizer.stream()
        for token in ids[: n % 4]:
            stream.push(token)
        stream.finish()
    with refusing():
        if n % 2:
            s.engine.tokenize("\ud800")
        else:
            s.engine.detokenize([s.vocab or 2**31 - 1])


@kind(Capability.LOGITS)
def scored(s: CallSubject, n: int) -> None:
    """Logits of one prompt; of none, which is refused."""
    s.engine.logits([1, 2][: 1 + n % 2])
    with refusing():
        s.engine.logits([])


@kind(Capability.LOGITS, Capability.BATCH)
def scored_together(s: CallSubject, n: int) -> None:
    s.engine.logits_batch([[1], [2, 3]][: 1 + n % 2])


@kind(Capability.TRACE)
def traced(s: CallSubject, n: int) -> None:
    for _ in s.engine.trace([1]):
        pass


@kind(Capability.MEMORY)
def told(s: CallSubject, n: int) -> None:
    """The engine's own figures."""
    s.engine.memory()
    s.engine.phases()


@kind()
def loaded(s: CallSubject, n: int) -> None:
    """In one round of five: a load takes as long as all other kinds together."""
    if n % 5 == 0:
        s.reopen(s.model).close()


@kind()
def malformed(s: CallSubject, n: int) -> None:
    """A load of a file that is refused, early or after all that could be read was."""
    with refusing():
        s.reopen(s.files[n % len(s.files)]).close()


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Swallow a refusal: what is asked here is what it leaves."""
    with contextlib.suppress(Exception):
        yield


def offered(s: CallSubject, folder: Path) -> dict[str, Callable[[int], object]]:
    """The kinds of call that this engine can be asked for, ready to be made; `folder` is for bad files."""
    if s.offers(Capability.GENERATE, Capability.TOKENIZE):
        s.stops = _stops(s.engine, s.vocab)
    if s.offers(Capability.GENERATE):
        s.seed = _ends(s.engine)
    s.poisoned = _poisoned(s, folder / "poisoned.gguf")
    files = [*_bad_files(s.model, folder), folder, folder / "missing.gguf"]
    s.files = [str(file) for file in files if _is_refused(s, file)]
    stored = Path(s.model).is_file()
    missing = {
        "stopped": not s.stops[1],
        "ended": s.seed is None,
        "poisoned": s.poisoned is None,
        "malformed": not stored,
        "loaded": not stored,
    }
    return {
        name: lambda n, call=call: call(s, n)  # type: ignore[misc]
        for name, (call, needs) in KINDS.items()
        if s.offers(*needs) and not missing.get(name, False)
    }


def _stops(engine: Engine, vocab: int) -> tuple[list[int], str]:
    """A prompt, and the text of the first tokens that follow it; empty where no text was found."""
    for first in range(min(vocab or TRIED_PROMPTS, TRIED_PROMPTS)):
        done = engine.generate([first], max_tokens=3, ignore_eos=True)
        for count in (1, 2, 3):
            with contextlib.suppress(UnicodeDecodeError):
                text = engine.detokenize(done.ids[:count]).decode().strip()
                if text:
                    return [first], text
    return [], ""


def _ends(engine: Engine) -> int | None:
    """A seed with which the end token is drawn first; None where none was found in time."""
    began = time.monotonic()
    for seed in range(SEEDS):
        if engine.generate([1], max_tokens=1, temperature=HOT, seed=seed).finish_reason == "eos":
            return seed
        if time.monotonic() - began > SEARCH_S:
            break
    return None


def _poisoned(s: CallSubject, file: Path) -> Engine | None:
    """The engine on a copy of the model that ends in what is no number in any floating type; None where it
    is too large, refused, or nothing comes of it."""
    source = Path(s.model)
    if not s.offers(Capability.GENERATE) or not source.is_file() or source.stat().st_size > COPIED_BYTES:
        return None
    data = bytearray(source.read_bytes())
    data[-128:] = b"\xff" * 128
    file.write_bytes(data)
    with contextlib.suppress(Exception):
        engine = s.reopen(str(file))
        try:
            engine.generate([1], max_tokens=1)
        except NotANumber:
            return engine
        engine.close()
    return None


def _bad_files(model: str, folder: Path) -> list[Path]:
    """Files that are no model: empty, foreign, cut, and the model itself with one name changed."""
    source = Path(model)
    if not source.is_file():
        return []
    size = source.stat().st_size
    with source.open("rb") as begin:
        head = begin.read(HEAD_BYTES)
    at = head.find(ARCHITECTURE) + len(ARCHITECTURE) + 8
    bad = [b"", b"not a model\n" * 9, head[: len(head) // 2], head[:24]]
    whole = [head[:at] + b"?" + head[at + 1 :]]
    whole += [head.replace(name.encode(), name[:-1].encode() + b"?") for name in NAMES]
    files = []
    for number, data in enumerate(itertools.chain(bad, whole)):
        file = folder / f"{number}.gguf"
        file.write_bytes(data)
        if number >= len(bad):  # as long as the model; what lies behind the head is a hole
            with file.open("r+b") as out:
                out.truncate(size)
        files.append(file)
    return files


def _is_refused(s: CallSubject, file: Path) -> bool:
    try:
        s.reopen(str(file)).close()
    except Exception:
        return True
    return False
