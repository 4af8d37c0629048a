"""What the runtime assumes where a model file is silent or unclear, and engines disagree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from prill_runtime.errors import PrillError
from prill_runtime.gguf.vocabulary import PREFIX, TokenType
from prill_runtime.tokenizer.ends import BY_TEXT
from prill_runtime.tokenizer.load import SentencePieceTokenizer, Tokenizer, load_tokenizer
from prill_runtime.tokenizer.pretokenizers import PRE_TOKENIZERS

REFUSED = "nothing: it is refused"
SCALINGS = ("none", "linear", "yarn", "longrope")


class Assumption(NamedTuple):
    """One thing that other engines may take otherwise.

    Attributes:
        key: the metadata key that is missing, unclear or contradicted.
        assumed: what prill takes in its place.
        why: what makes it an assumption, one clause.
    """

    key: str
    assumed: str
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {self.assumed}, for {self.why}"


class Described(Protocol):
    """What is read of a file: GGUFFile has it."""

    @property
    def architecture(self) -> str: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...


def assumptions(file: Described) -> tuple[Assumption, ...]:
    """Everything assumed of a file's tokenizer and rotary scaling, in that order.

    A file that prill refuses to load is described as far as its keys go; nothing is raised.
    """
    metadata = file.metadata
    try:
        tokenizer = load_tokenizer(metadata)
    except PrillError:
        tokenizer = None
    found = [*_words(metadata), *(_text(tokenizer, metadata) if tokenizer else ()), *_scaling(file)]
    return tuple(Assumption(*each) for each in found)


def remarks(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> tuple[str, ...]:
    """What is odd about the ids of a prompt, each a sentence: BOS twice, or text that no token stands for."""
    bos, said = tokenizer.bos_id, []
    if bos is not None and list(ids[:2]) == [bos, bos]:
        said.append(
            f"the prompt begins with BOS twice: its text spells {tokenizer.name(bos)!r} and "
            f"{PREFIX}add_bos_token adds another; both are kept, where other engines keep one"
        )
    if lost := tokenizer.lost(text):
        said.append(f"{lost} characters or bytes of the prompt have no token and were left out of it")
    return tuple(said)


def _words(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """How text is cut into words."""
    key, pre = PREFIX + "pre", metadata.get(PREFIX + "pre")
    if metadata.get(PREFIX + "model") != "gpt2":
        return
    if pre is None:
        yield key, "default", "no pre-tokenizer is named: engines that know the model cut other words"
    elif pre == "default":
        yield key, "default", "its converter did not know the pre-tokenizer of the model"
    elif pre not in PRE_TOKENIZERS:
        yield key, REFUSED, f"pre-tokenizer {pre!r:.80} is not known"


def _text(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What is put around a text, what ends one, and what stands for what."""
    spm, vocabulary = isinstance(tokenizer, SentencePieceTokenizer), tokenizer.vocabulary
    pre = metadata.get(PREFIX + "pre", "default")

    def silent(name: str) -> bool:
        return PREFIX + name not in metadata

    if silent("add_bos_token"):
        rule = 'family "llama"' if spm else f"pre-tokenizer {pre!r:.40}"
        adds = "true" if tokenizer.add_bos else "false"
        yield PREFIX + "add_bos_token", adds, f"the file does not say: the rule of {rule} holds"
    elif metadata[PREFIX + "add_bos_token"] and tokenizer.bos_id is None:
        yield PREFIX + "bos_token_id", "none, so that no BOS is added", "the file asks for one and names none"
    for role, token_id in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if silent(f"{role}_token_id") and (role == "eos" or token_id is not None):
            taken = "none" if token_id is None else f"{token_id} {tokenizer.name(token_id)!r:.40}"
            yield f"{PREFIX}{role}_token_id", taken, "the file names none, and defaults differ"
    if silent("token_type"):
        rest = ", <0xXX> a byte, unk unknown" if spm else ""
        yield PREFIX + "token_type", f"bos and eos control{rest}, all else normal", "the file has no types"
    if spm and silent("scores"):
        yield PREFIX + "scores", "0 for every token", "the file has none"
    if spm and silent("add_space_prefix"):
        yield PREFIX + "add_space_prefix", "true", "the file does not say whether a text begins with a space"
    if vocabulary.greedy:
        why = "the model's own tokenizer does so, and no key says it: other engines go by the model's name"
        yield PREFIX + "tokens", "white space behind special tokens goes with them", why
    if lacking := tokenizer.unspelled_bytes():
        unk = spm and vocabulary.unk_id is not None
        becomes = "becomes the unknown token" if unk else "is left out"
        yield PREFIX + "tokens", f"what needs them {becomes}", f"{lacking} of 256 bytes have no token"
    for token_id, reason in sorted(vocabulary.ends.items()):
        kind = vocabulary.types[token_id]
        if reason == BY_TEXT and kind != TokenType.CONTROL:
            marked = TokenType(kind).name.lower().replace("_", "-")
            name, why = tokenizer.name(token_id), f"its text says so, though it is marked {marked}"
            yield PREFIX + "token_type", f"{name!r:.40} ends a text", why
    if tokenizer.add_bos and _spells_bos(tokenizer, metadata.get("tokenizer.chat_template")):
        why = "the template spells BOS and the tokenizer adds one"
        yield "tokenizer.chat_template", "two BOS are kept as two", why


def _spells_bos(tokenizer: Tokenizer, template: object) -> bool:
    if not isinstance(template, str) or tokenizer.bos_id is None:
        return False
    spelling = tokenizer.name(tokenizer.bos_id)
    return "bos_token" in template or bool(spelling and spelling in template)


def _scaling(file: Described) -> Iterator[tuple[str, str, str]]:
    """How positions are scaled."""
    at = f"{file.architecture}.rope.scaling."
    kind, factor = file.metadata.get(at + "type"), file.metadata.get(at + "factor")
    scaled = isinstance(factor, int | float) and factor not in (0, 1)
    if kind is None and scaled:
        yield at + "type", "linear", f"a factor of {factor:g} is given without its type"
    if kind is not None and kind not in SCALINGS:
        yield at + "type", REFUSED, f"rotary scaling {kind!r:.40} is not implemented"
    if kind == "none" and scaled:
        yield at + "factor", "1", f"a factor of {factor:g} is given beside the type none"
    original = "original_context_length"
    if (kind not in (None, "none") or scaled) and at + original not in file.metadata:
        length = file.metadata.get(f"{file.architecture}.context_length")
        yield at + original, f"{length}, the context length", "the file scales positions and does not say"
