"""Small calls of every kind in the engine protocol, and with every way for a call to end.

Each is a place where memory may be left. They are small so that thousands are affordable: then a leak in one
request of two hundred shows as well as one in each. Every round calls each entry point of the protocol,
except loading a whole model.
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
HEAD_BYTES = 8 << 20  # bytes of a file within which the names to edit must lie
NAMES = ("output_norm.weight", "tokenizer.ggml.model")  # a tensor, and a key that is read after the tensors
ARCHITECTURE = b"general.architecture\x08\0\0\0"
TRIED_PROMPTS = 64  # to find a text to stop at
HOT, SEEDS, SEARCH_S = 3.0, 3000, 5.0  # to draw the end at once: temperature, most seeds, most seconds
COPIED_BYTES = 64 << 20  # the largest model of which a poisoned copy is made
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
    """The engine that is called, and what the calls need.

    Attributes:
        vocab, context: 0 if the engine does not tell. reopen: opens this engine on a file.
        stops: a prompt, and a text in its continuation. seed: one that draws the end token first.
        files: malformed ones. poisoned: the engine on a file whose last weights are NaN.
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
    """Register a kind of call under its function's name; the second argument counts its calls from 0."""

    def register(call: Call) -> Call:
        KINDS[call.__name__] = call, needs
        return call

    return register


@kind(Capability.GENERATE)
def greedy(s: CallSubject, n: int) -> None:
    """Generate no token, one or two; with and without a stop string that does not occur."""
    stop = ("\u00e9\u00e8 never",) if n % 4 == 1 else ()
    s.engine.generate([1], max_tokens=n % 3, ignore_eos=n % 2 == 0, stop=stop)


@kind(Capability.GENERATE)
def sampled(s: CallSubject, n: int) -> None:
    s.engine.generate([1, 2], max_tokens=1, seed=n, ignore_eos=True, **DRAWN[n % len(DRAWN)])  # type: ignore[arg-type]


@kind(Capability.GENERATE, Capability.TOKENIZE)
def stopped(s: CallSubject, n: int) -> None:
    """A text that ends at a stop string: the first of several, or the last."""
    prompt, text = s.stops
    stop = (text, "\u00e9\u00e8 never") if n % 2 else ("never this one", text)
    done = s.engine.generate(prompt, max_tokens=4, ignore_eos=True, stop=stop)
    if done.finish_reason != "stop":
        raise Inconclusive("the request did not stop at its string", got=done.finish_reason)


@kind(Capability.GENERATE)
def ended(s: CallSubject, n: int) -> None:
    """A text that ends with the end token; alone, and in a batch with a text that goes on."""
    hot = SamplingParams(temperature=HOT, seed=s.seed or 0)
    if n % 3:
        s.engine.generate([1], max_tokens=1, temperature=hot.temperature, seed=hot.seed)
    elif s.offers(Capability.BATCH):
        s.engine.generate_batch([[1], [2]], max_tokens=2, sampling=[hot, SamplingParams()])


@kind(Capability.GENERATE)
def poisoned(s: CallSubject, n: int) -> None:
    """A text that fails on NaN logits; in every third round."""
    with refusing():
        if n % 3 == 0 and s.poisoned is not None:
            s.poisoned.generate([1], max_tokens=1)


@kind(Capability.GENERATE)
def cancelled(s: CallSubject, n: int) -> None:
    """A text cancelled by the callback's answer, or by its exception."""

    def answer(token: int, logprob: float) -> bool:
        if n % 2:
            raise KeyError(token)
        return False

    with contextlib.suppress(KeyError):
        s.engine.generate([1], max_tokens=3, ignore_eos=True, on_token=answer)


@kind(Capability.GENERATE)
def filled(s: CallSubject, n: int) -> None:
    """Fill the context to its last position, if its length is known and short; in every other round."""
    if n % 2:
        return
    length = s.context - 1 if 2 < s.context <= 64 else 2
    s.engine.generate([n % 3] * length, max_tokens=4, ignore_eos=True)


@kind(Capability.GENERATE, Capability.BATCH)
def batched(s: CallSubject, n: int) -> None:
    """A batch of different prompts, greedy and sampled, that end together or not."""
    drawn = [SamplingParams(), SamplingParams(temperature=1.0, seed=n)] if n % 3 else ()
    s.engine.generate_batch([[1], [2, 3]], max_tokens=1 + n % 2, ignore_eos=n % 5 > 0, sampling=drawn)


@kind(Capability.GENERATE, Capability.BATCH)
def batch_refused(s: CallSubject, n: int) -> None:
    """A batch that is refused because of one prompt."""
    with refusing():
        s.engine.generate_batch([[1], []], max_tokens=1)


@kind(Capability.GENERATE)
def refused(s: CallSubject, n: int) -> None:
    """Refused requests: a bad parameter, no id, an id outside the vocabulary, too many ids."""
    bad: list[dict[str, Any]] = [*REFUSED, {"ids": []}, {"ids": [1, s.vocab or 2**31 - 1]}]
    if 0 < s.context <= 8192 and n % 9 == 8:
        bad = [{"ids": [1] * (s.context + 1)}]
    with refusing():
        s.engine.generate(**{"ids": [1], "max_tokens": 1, **bad[n % len(bad)]})


@kind(Capability.SESSIONS)
def held(s: CallSubject, n: int) -> None:
    """A session that is fed, reset, fed again, overfilled, closed."""
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
    if isinstance(model, Model):  # whose tokenizer can also stream
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
    """Logits of one prompt, and of none, which is refused."""
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
    """The figures that the engine reports."""
    s.engine.memory()
    s.engine.phases()


@kind()
def loaded(s: CallSubject, n: int) -> None:
    """Load the model; in every fifth round, for a load takes as long as all other kinds together."""
    if n % 5 == 0:
        s.reopen(s.model).close()


@kind()
def malformed(s: CallSubject, n: int) -> None:
    """Load a file that is refused, early or only after everything readable was read."""
    with refusing():
        s.reopen(s.files[n % len(s.files)]).close()


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Swallow a refusal: only what it leaves behind matters here."""
    with contextlib.suppress(Exception):
        yield


def offered(s: CallSubject, folder: Path) -> dict[str, Callable[[int], object]]:
    """The kinds of call that this engine offers, ready to be made; bad files go to `folder`."""
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
    """A prompt, and the text of the first tokens that follow it; empty if none was found."""
    for first in range(min(vocab or TRIED_PROMPTS, TRIED_PROMPTS)):
        done = engine.generate([first], max_tokens=3, ignore_eos=True)
        for count in (1, 2, 3):
            with contextlib.suppress(UnicodeDecodeError):
                text = engine.detokenize(done.ids[:count]).decode().strip()
                if text:
                    return [first], text
    return [], ""


def _ends(engine: Engine) -> int | None:
    """A seed that draws the end token first; None if none was found in time."""
    began = time.monotonic()
    for seed in range(SEEDS):
        if engine.generate([1], max_tokens=1, temperature=HOT, seed=seed).finish_reason == "eos":
            return seed
        if time.monotonic() - began > SEARCH_S:
            break
    return None


def _poisoned(s: CallSubject, file: Path) -> Engine | None:
    """The engine on a copy of the model whose last bytes are NaN in any floating type; None if the model is
    too large, the copy is refused, or the NaN has no effect."""
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
    """Files that are not a model: empty, foreign, truncated, and the model itself with one name changed."""
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
        if number >= len(bad):  # as long as the model, with a hole behind the head
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
