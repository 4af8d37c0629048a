"""Which ids end a text, and what says so of each: a key of the file, or the token's own text."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from prill_runtime.gguf.vocabulary import END_KEYS, FILL_IN_KEYS

# Texts that end a generation whatever type the file gives them: converters often forget to mark them
# (llama.cpp, llama-vocab.cpp, "tokens that cause end-of-generation").
END_TEXTS = (
    "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>",
    "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<end_of_turn>", "<end_of_utterance>", "<EOT>",
    "_<EOT>", "[EOT]", "[EOS]", "<｜end▁of▁sentence｜>", "[e~[", "<turn|>", "<|tool_response>",
)  # fmt: skip
# Ends of fill-in-the-middle: by their key, or by their text where the file is silent.
FILL_IN_TEXTS = (
    ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    ("<|file_sep|>",),
)
FILL_IN = dict(zip(FILL_IN_KEYS, FILL_IN_TEXTS, strict=True))
# A text that does not end the generation in vocabularies that have all of the others.
NO_END = (
    ("<|end|>", ("<|return|>", "<|call|>")),
    ("<|end|>", ("<|calls|>", "<|flush|>")),
    ("<|end|>", ("<|call|>", "<|flush|>")),
    ("</s>", ("<|tool_response>",)),
)
BY_TEXT = "its text"


def known_ends(stated: Collection[str], ids: Mapping[str, int]) -> frozenset[int]:
    """The ids whose text ends a generation.

    Args:
        stated: the keys of FILL_IN that the file has; their texts are not looked at then.
        ids: spelling -> id.
    """
    texts = [text for text in END_TEXTS if text in ids]
    for text, others in NO_END:
        if text in texts and all(other in texts for other in others):
            texts.remove(text)
    texts += [text for key, names in FILL_IN.items() if key not in stated for text in names if text in ids]
    return frozenset(ids[text] for text in texts)


def ends(stated: Mapping[str, int], known: Collection[int]) -> dict[int, str]:
    """The ids that end a text: id -> the key that names it, or BY_TEXT.

    Args:
        stated: the keys of END_KEYS and FILL_IN that the file has, or that its family has by default.
        known: the ids whose text ends a generation.
    """
    by_key = {stated[key]: key for key in reversed((*END_KEYS, *FILL_IN)) if key in stated}
    return dict.fromkeys(known, BY_TEXT) | by_key
