"""Faults of tokenizers: of special tokens, pieces and their order, bytes, and streamed text."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

from prill_harness.planting.faults import Patch, fault

TOKENIZER = "prill_runtime.tokenizer.base:Tokenizer"
ENCODE = f"{TOKENIZER}.encode"
READER = "prill_runtime.tokenizer.base:_PieceReader.read"
PUSH = "prill_runtime.tokenizer.base:TextStream.push"
SPM = "prill_runtime.tokenizer.spm"
BLAMES = ("tokenizer",)
SPM_FILE, BPE_FILE = ("fixture:llama-tiny",), ("fixture:gpt2-tiny",)  # by their kinds of vocabulary


def other_text(changed: Callable[[str], str]) -> Iterator[Patch]:
    """Ids of another text than was given."""
    yield Patch(
        ENCODE, lambda encode: lambda self, text, *rest, **named: encode(self, changed(text), *rest, **named)
    )


@fault(area="tokenizer", blames=BLAMES, models=SPM_FILE)
def bos_missing() -> Iterator[Patch]:
    """BOS is not added though the file asks for it."""
    yield Patch(ENCODE, lambda encode: lambda self, text, add_special=True: encode(self, text, False))


@fault(area="tokenizer", blames=BLAMES, models=SPM_FILE)
def bos_twice() -> Iterator[Patch]:
    """BOS is added by the template and by the tokenizer."""

    def wrap(encode: Any) -> Any:
        return lambda self, text, add_special=True: (
            [self.bos_id] * add_special + encode(self, text, add_special)
        )

    yield Patch(ENCODE, wrap)


@fault(area="tokenizer", blames=BLAMES)
def eos_added() -> Iterator[Patch]:
    """EOS is put behind every prompt, which asks for no continuation."""

    def wrap(encode: Any) -> Any:
        return lambda self, text, add_special=True: (
            encode(self, text, add_special) + [self.eos_id] * add_special
        )

    yield Patch(ENCODE, wrap)


@fault(area="tokenizer", blames=BLAMES)
def ends_forgotten() -> Iterator[Patch]:
    """No token of the vocabulary is known to end a text."""
    yield Patch("prill_runtime.tokenizer.vocabulary:ends", lambda ends: lambda stated, known: {})


@fault(area="tokenizer", blames=BLAMES)
def special_token_split() -> Iterator[Patch]:
    """The spelling of a control token is split into pieces like any text."""

    def wrap(partition: Any) -> Any:
        return lambda self, text, parse_special: partition(self, text, False)

    yield Patch(f"{TOKENIZER}._partition", wrap)


@fault(area="tokenizer", blames=BLAMES, models=SPM_FILE)
def space_prefix_lost() -> Iterator[Patch]:
    """The space that belongs in front of a text is not put there."""

    def wrap(merge: Any) -> Any:
        return lambda text, *rest: merge(text[1:], *rest)

    yield Patch(f"{SPM}:merge_by_score", wrap)


@fault(area="tokenizer", blames=BLAMES)
def space_prefix_kept() -> Iterator[Patch]:
    """One space too many is put in front of a text."""
    yield from other_text(lambda text: f" {text}" if text else text)


@fault(area="tokenizer", blames=BLAMES)
def text_normalised() -> Iterator[Patch]:
    """Text is brought into Unicode's compatibility form first."""
    yield from other_text(lambda text: unicodedata.normalize("NFKC", text))


@fault(area="tokenizer", blames=BLAMES)
def text_stripped() -> Iterator[Patch]:
    """White space around a text is thrown away."""
    yield from other_text(str.strip)


@fault(area="tokenizer", blames=BLAMES)
def text_in_lower_case() -> Iterator[Patch]:
    """Capital letters of ASCII are read as small ones."""
    yield from other_text(lambda text: text.encode().lower().decode())


@fault(area="tokenizer", blames=BLAMES)
def newlines_translated() -> Iterator[Patch]:
    """A carriage return before a line feed is swallowed."""
    yield from other_text(lambda text: text.replace("\r\n", "\n"))


@fault(area="tokenizer", blames=BLAMES, models=SPM_FILE)
def merge_order() -> Iterator[Patch]:
    """Neighbours merge from left to right, whatever their scores."""

    def wrap(merge: Any) -> Any:
        return lambda text, scores, *rest: merge(text, dict.fromkeys(scores, 0.0), *rest)

    yield Patch(f"{SPM}:merge_by_score", wrap)


@fault(area="tokenizer", blames=BLAMES, models=BPE_FILE)
def merge_ranks_reversed() -> Iterator[Patch]:
    """The last merge of the list goes first."""
    yield Patch("prill_runtime.tokenizer.bpe:_merges", lambda merges: lambda *given: merges(*given)[::-1])


@fault(area="tokenizer", blames=BLAMES, models=SPM_FILE)
def byte_fallback_lost() -> Iterator[Patch]:
    """What no piece spells becomes the unknown token where it has bytes."""

    def wrap(made: Any) -> Any:
        def without(self: Any, *given: Any) -> None:
            made(self, *given)
            self._bytes = {}

        return without

    yield Patch(f"{SPM}:SentencePieceTokenizer.__init__", wrap)


@fault(area="tokenizer", blames=BLAMES)
def pieces_decoded_alone() -> Iterator[Patch]:
    """Every piece becomes text by itself, so that a character of several pieces is lost."""

    def wrap(read: Any) -> Any:
        return lambda self, token_id: read(self, token_id).decode("utf-8", "replace").encode()

    yield Patch(READER, wrap)


@fault(area="tokenizer", blames=BLAMES, models=SPM_FILE)
def every_space_stripped() -> Iterator[Patch]:
    """The space in front of a piece is taken for the one that encoding added, in the middle of a text too."""

    def wrap(read: Any) -> Any:
        def stripped(self: Any, token_id: int) -> bytes:
            self.restart()
            return bytes(read(self, token_id))

        return stripped

    yield Patch(READER, wrap)


@fault(area="tokenizer", blames=BLAMES)
def character_split_in_stream() -> Iterator[Patch]:
    """Streamed text shows a replacement character for half of a character."""

    def wrap(push: Any) -> Any:
        return lambda self, token_id: self._reader.read(token_id).decode("utf-8", "replace")

    yield Patch(PUSH, wrap)


@fault(area="tokenizer", blames=BLAMES)
def stream_holds_back() -> Iterator[Patch]:
    """Streamed text appears one token late, and the last one never."""

    def wrap(push: Any) -> Any:
        def late(self: Any, token_id: int) -> str:
            self.held, shown = push(self, token_id), getattr(self, "held", "")
            return str(shown)

        return late

    yield Patch(PUSH, wrap)
