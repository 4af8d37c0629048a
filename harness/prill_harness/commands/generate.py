"""A prompt goes in; the model's text comes out as it is made."""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Callable, Sequence

import click

from prill_harness.commands import command as declare
from prill_harness.commands import vram_option
from prill_harness.console import Console, write
from prill_runtime.errors import UsageError


class TextStream:
    """Ids go in one by one; text comes out that never splits a character and never shows a stop string.

    Args:
        detokenize: ids -> bytes of the engine.
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
        """The text that is certain after one more id."""
        self._ids.append(token)
        whole = self._detokenize(self._ids)
        fresh, self._seen = whole[self._seen :], len(whole)
        return self._release(self._decoder.decode(fresh))

    def finish(self) -> str:
        """What was held back; bytes that never became a character are replaced by U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = ("" if self.stopped else self._held), ""
        return text + rest

    def _release(self, text: str) -> str:
        """Hold back the longest tail that may still grow into a stop string."""
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


@declare(
    name="generate",
    example='prill generate --model fixture:llama-tiny --prompt "The " --max-tokens 40\n'
    "echo 'Once' | prill generate --model model.gguf --prompt - --temperature 0.8 --seed 7",
)
@click.option("--engine", default="numpy", show_default=True, help="Engine spec.")
@vram_option
@click.option("--model", required=True, help="Path, or fixture:NAME[:TYPE].")
@click.option("--prompt", default="-", show_default=True, help="Text to continue; - reads stdin.")
@click.option("--max-tokens", type=click.IntRange(min=0), default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest id.")
@click.option("--top-k", type=int, default=0, show_default=True, help="0 keeps all.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--min-p", type=float, default=0.0, show_default=True)
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the end of text.")
def command(
    console: Console,
    engine: str,
    model: str,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int,
    stop: tuple[str, ...],
    ignore_eos: bool,
) -> int:
    """Stream the continuation of a prompt; the speed goes to stderr."""
    from prill_harness.engines import open_engine

    text = _stdin() if prompt == "-" else prompt
    with open_engine(engine, model) as opened:
        ids = opened.tokenize(text)
        stream = TextStream(opened.detokenize, ids, stop)
        pieces: list[str] = []
        times: list[float] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            if piece and not console.json:
                write(sys.stdout, piece)

        def on_token(token: int, logprob: float) -> bool:
            times.append(time.perf_counter())
            show(stream.push(token))
            return True

        began = time.perf_counter()
        made = opened.generate(
            ids,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            on_token=on_token,
        )
        show(stream.finish())
    if not console.json:
        write(sys.stdout, "\n")
    first, speed = _speed(began, times)
    console.emit(
        {
            "text": "".join(pieces),
            "ids": made.ids,
            "logprobs": made.logprobs,
            "finish_reason": made.finish_reason,
            "prompt_ids": ids,
            "first_token_s": first,
            "tokens_per_s": speed,
        }
    )
    rate = f", {speed:.1f} tokens/s" if speed else ""
    console.remark(
        f"{len(ids)} prompt tokens, {len(made.ids)} generated, ended by {made.finish_reason}; "
        f"first token after {first:.3f} s{rate}"
    )
    return 0


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("the prompt is not UTF-8", where="stdin", got=f"byte {error.start}") from error


def _speed(began: float, times: Sequence[float]) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second of the decoding after it."""
    if not times:
        return 0.0, 0.0
    span = times[-1] - times[0]
    return times[0] - began, (len(times) - 1) / span if span > 0 else 0.0
