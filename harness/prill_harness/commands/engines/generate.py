"""`prill generate`: stream a model's text."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

import click

from prill_harness.commands.shared.declare import SPECS, vram_option
from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console, write
from prill_harness.engines.textstream import IncrementalDetokenizer
from prill_runtime.errors import UsageError


@declare(
    name="generate",
    example='prill generate --model fixture:llama-tiny --prompt "The " --max-tokens 40\n'
    "echo 'Once' | prill generate --model model.gguf --prompt - --temperature 0.8 --seed 7",
)
@click.option("--engine", default="numpy", show_default=True, help=f"{SPECS}.")
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
    from prill_harness.engines.given_prompt import about, ended_by
    from prill_harness.faults.opening import open_engine

    text = _stdin() if prompt == "-" else prompt
    with open_engine(engine, model) as opened:
        ids = opened.tokenize(text)
        for sentence in about(opened, text, ids):
            console.remark(sentence)
        stream = IncrementalDetokenizer(opened.detokenize, ids, stop)
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
        end = ended_by(opened, made)
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
            "ended_by": end,
            "prompt_ids": ids,
            "first_token_s": first,
            "tokens_per_s": speed,
        }
    )
    rate = f", {speed:.1f} tokens/s" if speed else ""
    console.remark(
        f"{len(ids)} prompt tokens, {len(made.ids)} generated, ended by {made.finish_reason}{_named(end)}; "
        f"first token after {first:.3f} s{rate}"
    )
    return 0


def _named(end: Mapping[str, object] | None) -> str:
    return f" (id {end['id']} {end['text']!r}, by {end['by']})" if end else ""


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("the prompt is not UTF-8", where="stdin", got=f"byte {error.start}") from error


def _speed(began: float, times: Sequence[float]) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second of decoding after it."""
    if not times:
        return 0.0, 0.0
    span = times[-1] - times[0]
    return times[0] - began, (len(times) - 1) / span if span > 0 else 0.0
