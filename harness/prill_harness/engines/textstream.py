"""Show a text while it is generated."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class IncrementalDetokenizer:
    """Turns ids into text one by one, never splitting a character and never showing a stop string.

    Args:
        detokenize: the engine's, ids -> bytes.
        prompt: ids before the first generated one; they decide whether a leading space belongs to it.
        stop: strings that end the text.
    """

    def __init__(
        self, detokenize: Callable[[Sequence[int]], bytes], prompt: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self._detokenize, self._ids = detokenize, list(prompt)
        self._seen = len(detokenize(self._ids))
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = [s for s in stop if s]
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add an id; the further text that is certain now."""
        self._ids.append(token)
        whole = self._detokenize(self._ids)
        fresh, self._seen = whole[self._seen :], len(whole)
        return self._release(self._decoder.decode(fresh))

    def finish(self) -> str:
        """The text held back so far; bytes that never became a character are replaced by U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = ("" if self.stopped else self._held), ""
        return text + rest

    def _release(self, text: str) -> str:
        """Release all but the longest tail that may still grow into a stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        ends = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        tail = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        cut = len(text) - tail
        self._held = text[cut:]
        return text[:cut]
