"""Show on a terminal where two texts part: both of them, their tokens, and what each side thought best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from prill_harness.commands.shared.declare import quoted
from prill_harness.console import Console, printable

AROUND = 48  # characters shown on either side of where two texts part
MARK = "<"  # beside the row of the first token that differs


def show(console: Console, found: Mapping[str, Any]) -> None:
    """One divergence, as evidence keeps it; whatever else it holds comes as facts and tables."""
    rest = dict(found)
    texts = [rest.pop(name, None) for name in ("expected_text", "got_text")]
    tokens = [rest.pop(name, None) for name in ("expected", "got")]
    best = [rest.pop(name, None) for name in ("oracle_top", "candidate_top")]
    _facts(console, rest)
    if all(isinstance(text, str) for text in texts):
        for line in marked(str(texts[0]), str(texts[1])):
            console.line(f"  {line}")
    if all(isinstance(each, list) for each in tokens):
        _tokens(console, tokens, rest.get("position"))
    elif any(each is not None for each in tokens):
        _facts(console, dict(zip(("expected", "got"), tokens, strict=True)))
    if any(best):
        _best(console, best)


def marked(expected: str, got: str) -> Iterator[str]:
    """Both texts on a line each, cut to what lies around the first difference, and a caret below it."""
    left, right = (printable(quoted(text)[1:-1]) for text in (expected, got))
    pairs = enumerate(zip(left, right, strict=False))
    same = next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))
    start = max(0, same - AROUND)
    dots = "…" if start else ""
    for name, text in (("expected", left), ("got", right)):
        end = same + AROUND
        yield f"{name:8}  {dots}{text[start:end]}{'…' if len(text) > end else ''}"
    yield f"{'':8}  {' ' * (len(dots) + same - start)}^ {'the same' if left == right else 'here'}"


def _tokens(console: Console, tokens: Sequence[Any], position: object) -> None:
    pairs = list(zip_longest(*tokens, fillvalue="nothing"))
    first = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
    begin = position - first if isinstance(position, int) and first is not None else 0
    console.table(
        ("position", "expected", "got", ""),
        [(begin + at, a, b, MARK if at == first else "") for at, (a, b) in enumerate(pairs)],
    )


def _best(console: Console, best: Sequence[Any]) -> None:
    """The best tokens of oracle and engine side by side, a line a rank."""
    pairs = zip_longest(*(each or [] for each in best))
    rows = [(rank, *_candidate(mine), *_candidate(theirs)) for rank, (mine, theirs) in enumerate(pairs, 1)]
    console.table(("rank", "oracle", "logprob", "engine", "logprob"), rows)


def _candidate(found: Any) -> tuple[str, str]:
    """Token and logprob of an entry [id, name, logprob]."""
    return (str(found[1]), f"{found[2]:.4g}") if found else ("", "")


def _facts(console: Console, found: Mapping[str, Any], indent: str = "  ") -> None:
    for name, value in found.items():
        told = name.replace("_", " ")
        if isinstance(value, Mapping):
            console.line(f"{indent}{told}:")
            _facts(console, value, f"{indent}  ")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            console.line(f"{indent}{told}:")
            columns = list(dict.fromkeys(key for row in value for key in row))
            console.table(columns, [[row.get(key, "") for key in columns] for row in value])
        elif value not in (None, "", [], {}):
            shown = quoted(value) if isinstance(value, str) else value
            shown = f"{value:.6g}" if isinstance(value, float) else shown
            console.line(f"{indent}{told}: {shown}")
