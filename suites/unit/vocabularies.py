"""Sizes and choices drawn by hypothesis go in; the tokenizer metadata of a sound vocabulary comes out."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from .tiny_gguf import byte_alphabet

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
LETTERS = "eatosn.,<>|'é日本語中文ß🧪мירح0123 "
WORDS = (
    "the",
    "▁the",
    "▁",
    "▁▁",
    "ing",
    "日本",
    "été",
    "▁é",
    "🧪🧪",
    "plain",
    "a",
    "aa",
    "aaa",
    "</s",
    "im_end",
)
SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<|return|>", "<|call|>", "<PAD>",
    "[u]", "  ", "e", "ain", "<turn|>", "<｜end▁of▁sentence｜>",
)  # fmt: skip
KINDS = (NORMAL, CONTROL, USER_DEFINED, UNUSED)
BYTES = st.sampled_from(["all", "some", "none"])
PIECE = st.sampled_from(WORDS) | st.text(st.sampled_from(LETTERS), min_size=1, max_size=4)
PRES = ("gpt-2", "llama-bpe", "default", "tekken", "qwen2", "deepseek-v3", "chameleon", None)


def _bytes(draw: Any) -> list[int]:
    return {"all": [*range(256)], "some": [*range(32, 127, 2), 0xC3, 0xA9, 0xE6], "none": []}[draw(BYTES)]


def _specials(draw: Any) -> dict[str, int]:
    chosen = draw(st.lists(st.sampled_from(SPECIAL), unique=True, max_size=4))
    return {text: draw(st.sampled_from(KINDS)) for text in chosen}


@st.composite
def spm(draw: Any) -> dict[str, Any]:
    """Family "llama", of 1 to 400 tokens: byte tokens all, some or none, with and without unk, bos, eos."""
    tokens: dict[str, int] = {"<unk>": UNKNOWN} if draw(st.booleans()) else {}
    tokens |= _specials(draw)
    tokens |= {f"<0x{byte:02X}>": BYTE for byte in _bytes(draw)}
    letters = draw(st.lists(st.sampled_from("▁" + LETTERS.replace(" ", "")), unique=True))
    pieces = {piece.replace(" ", "▁") for piece in draw(st.lists(PIECE, max_size=30))}
    for piece in [*letters, *sorted(pieces)]:
        tokens.setdefault(piece, draw(st.sampled_from((NORMAL, NORMAL, NORMAL, USER_DEFINED, UNUSED))))
    size = draw(st.integers(1, 400))
    tokens = dict(list(tokens.items() if draw(st.booleans()) else reversed(tokens.items()))[:size])
    names = [*tokens] or ["a"]
    scores = draw(st.sampled_from(["falling", "drawn", "missing"]))
    given = {
        "falling": [-float(n) for n in range(len(names))],
        "drawn": [float(draw(st.integers(-3, 0))) for _ in names] if scores == "drawn" else [],
        "missing": None,
    }[scores]
    return _named(draw, "llama", names, [*tokens.values()] or [NORMAL], {
        "scores": given, "add_space_prefix": draw(st.sampled_from([None, True, False])),
    })  # fmt: skip


@st.composite
def bpe(draw: Any) -> dict[str, Any]:
    """Family "gpt2": bytes all, some or none, words of them with the merges that lead there, or some."""
    alphabet = byte_alphabet()
    tokens = dict.fromkeys((alphabet[byte] for byte in _bytes(draw)), NORMAL)
    merges: list[str] = []
    for text in draw(st.lists(PIECE, max_size=30)):
        spelled = [alphabet[byte] for byte in text.replace("▁", " ").encode()]
        left = spelled[0]
        for right in spelled[1:]:
            if left not in tokens or right not in tokens or draw(st.integers(0, 7)) == 0:
                break
            merges.append(f"{left} {right}")
            left += right
            tokens.setdefault(left, NORMAL)
        else:
            tokens.setdefault("".join(spelled), NORMAL)  # whole, though not every merge need lead to it
    tokens.setdefault("aa", NORMAL)
    tokens.setdefault("a", NORMAL)
    for text, kind in _specials(draw).items():
        tokens.setdefault(text, kind)
    if not merges:
        merges = ["a a"]
    pre = draw(st.sampled_from(PRES))
    return _named(draw, "gpt2", [*tokens], [*tokens.values()], {"merges": merges, "pre": pre})


def _named(
    draw: Any, model: str, tokens: list[str], types: list[int], rest: dict[str, Any]
) -> dict[str, Any]:
    """The metadata, with special ids that stand on any token, or on none, and flags or none."""
    # Without types a special id makes a control token, which no merge may give.
    typed = draw(st.integers(0, 4)) > 0
    merges = [merge.split(" ") for merge in rest.get("merges") or ()]
    merged = {text for left, right in merges for text in (left, right, left + right)}
    apart = [i for i, token in enumerate(tokens) if token[0] in "<[" and token not in merged]
    some = [*range(len(tokens))] if typed else apart
    ids = st.none() | st.sampled_from(some) if some else st.none()
    roles = ("bos", "eos", "eot", "fim_pad", *(("unknown",) if UNKNOWN in types else ()))
    keys: dict[str, Any] = {f"{role}_token_id": draw(ids) for role in roles}
    if "unknown_token_id" in keys:
        keys["unknown_token_id"] = draw(st.sampled_from([None, types.index(UNKNOWN)]))
    for flag in ("add_bos_token", "add_eos_token"):
        keys[flag] = draw(st.sampled_from([None, True, False]))
    keys |= {
        "model": model,
        "tokens": tokens,
        "token_type": types if typed else None,
        **rest,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
