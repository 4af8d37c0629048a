"""What servers speak: llama.cpp's own API, and OpenAI's completions as vLLM, SGLang and others have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from prill_harness.engines.channels.completions import TOLD, Dialect, Entry, Said, by_id, entry_of
from prill_harness.engines.channels.link import Link
from prill_harness.engines.channels.texts import spelled
from prill_harness.engines.remote import Channel, Hello, Target
from prill_runtime.errors import EngineError, InvalidParameter, MissingCapability, UsageError
from prill_runtime.sampling.sampler import SamplingParams
from prill_runtime.tokenizer.base import Tokenizer

NUMBERED = "token_id:"  # how servers write a token when asked for ids instead of texts
AT_ONCE = 16  # requests on their way at one time: what has no slot yet waits
OWN_RANDOM = (1 << 32) - 1  # the seed by which llama.cpp means: choose one


class LlamaCpp(Dialect):
    """llama.cpp's server: every id is told, ends included."""

    def _greet(self) -> Hello:
        props = self._link.ask("/props")
        listed = (self._listed() or [{}])[0]
        meta, context = listed.get("meta") or {}, (props["default_generation_settings"] or {}).get("n_ctx")
        names = {"n_vocab": "vocab_size", "n_embd": "width", "n_ctx_train": "context_length"}
        config = {ours: meta[theirs] for theirs, ours in names.items() if isinstance(meta.get(theirs), int)}
        if isinstance(context, int):
            self._context = {"served_context": context}
        return Hello(
            "llama.cpp", self._calls(), version=str(props.get("build_info", "unknown")),
            config={**config, **self._context}, draws="own", pid=self._pid, at_once=AT_ONCE,
        )  # fmt: skip

    def _tokenize(self, text: str, add_special: bool) -> Any:
        asked = {"content": text, "add_special": add_special, "parse_special": True}
        return self._field("/tokenize", asked, "tokens")

    def _detokenize(self, ids: Sequence[int]) -> Any:
        return self._field("/detokenize", {"tokens": list(ids)}, "content")

    def _asked(
        self, ids: Sequence[int], count: int, stop: Sequence[str], ignore_eos: bool, params: SamplingParams
    ) -> tuple[str, dict[str, Any]]:
        # Its ignore_eos forbids the end instead of drawing it like any other: not asked for.
        if params.seed >= OWN_RANDOM and params.temperature:
            raise MissingCapability("llama.cpp's server has seeds of 32 bits", where=self._link.name)
        return "/completion", {
            **({} if self._model is None else {"model": self._model}),
            "prompt": list(ids), "n_predict": count, "n_probs": TOLD, "return_tokens": True,
            "stop": list(stop), "seed": params.seed, "temperature": params.temperature,
            "top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p,
            "repeat_penalty": params.repetition_penalty, "repeat_last_n": len(ids) + count,
            "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        }  # fmt: skip

    def _read(self, message: Any, count: int, stop: Sequence[str]) -> Said:
        ids, entries = message.get("tokens"), by_id(message.get("completion_probabilities") or ())
        said = Said(message["content"], None if ids is None else [int(each) for each in ids], entries)
        if message["stop"]:
            kinds = {"eos": "eos", "word": "stop", "limit": "context" if message["truncated"] else "length"}
            said.reason, said.total = kinds[message["stop_type"]], int(message["tokens_predicted"])
        return said


class Takes(NamedTuple):
    """What a server takes: vLLM's additions, prompts of ids, and how many best logprobs it tells."""

    extras: bool
    ids: bool
    told: int


LESS = (Takes(True, True, TOLD), Takes(True, True, 5), Takes(False, True, 5), Takes(False, True, 0),
        Takes(False, False, 5), Takes(False, False, 0))  # fmt: skip


class OpenAI(Dialect):
    """OpenAI's completions, with what vLLM and SGLang add to them as far as a server takes it.

    What a server takes is found by asking for one token, first with everything and then with less.
    """

    def _greet(self) -> Hello:
        listed = self._listed()
        if self._model is None:
            if len(listed) != 1:
                raise UsageError(
                    "which model?", where=self._link.name, expected="model= in the spec, of those it serves",
                    got=", ".join(str(each.get("id")) for each in listed) or "none",
                )  # fmt: skip
            self._model = str(listed[0]["id"])
        own = next((each for each in listed if each.get("id") == self._model), {})
        self._trial()
        if isinstance(own.get("max_model_len"), int):
            self._context = {"served_context": own["max_model_len"]}
        return Hello(
            str(own.get("owned_by") or "OpenAI-compatible"), self._calls(), version=self._version(),
            config={**self._context}, draws="own", pid=self._pid, at_once=AT_ONCE,
        )  # fmt: skip

    def _trial(self) -> None:
        prompt = self._tokenizer.encode("The") or [0]
        for takes in LESS:
            self._takes = takes
            try:
                path, body = self._asked(prompt, 1, (), False, SamplingParams())
                self._link.ask(path, body)
            except (InvalidParameter, MissingCapability) as error:
                refused = error
            else:
                return
        raise EngineError("no completion can be had", where=self._link.name, got=refused.what) from None

    def _version(self) -> str:
        with suppress(MissingCapability, InvalidParameter, EngineError):
            return str(self._link.ask("/version")["version"])
        return "unknown"

    def _tokenize(self, text: str, add_special: bool) -> Any:
        asked = {"model": self._model, "prompt": text, "add_special_tokens": add_special}
        return self._field("/tokenize", asked, "tokens")

    def _detokenize(self, ids: Sequence[int]) -> Any:
        return self._field("/detokenize", {"model": self._model, "tokens": list(ids)}, "prompt", "text")

    def _asked(
        self, ids: Sequence[int], count: int, stop: Sequence[str], ignore_eos: bool, params: SamplingParams
    ) -> tuple[str, dict[str, Any]]:
        prompt = list(ids) if self._takes.ids else spelled(self._tokenizer, ids, self._link.name)
        body: dict[str, Any] = {
            "model": self._model, "prompt": prompt,
            "max_tokens": count, "temperature": params.temperature, "top_p": params.top_p,
            "seed": params.seed,
        }  # fmt: skip
        if stop:
            body["stop"] = list(stop)
        if self._takes.told:
            body["logprobs"] = self._takes.told
        extras = {
            "ignore_eos": ignore_eos, "top_k": params.top_k or -1, "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
        }  # fmt: skip
        if self._takes.extras:
            by_id = ("return_tokens_as_token_ids", "return_token_ids")
            asked = dict.fromkeys(by_id, True) | {"skip_special_tokens": False}
            return "/v1/completions", {**body, **extras, **asked}
        usual = {"ignore_eos": False, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        if unusual := [name for name, value in extras.items() if value != usual[name]]:
            raise MissingCapability(f"the server does not take {', '.join(unusual)}", where=self._link.name)
        return "/v1/completions", body

    def _read(self, message: Any, count: int, stop: Sequence[str]) -> Said:
        if not message["choices"]:
            return Said("", [])
        choice = message["choices"][0]
        entries = _of_choice(choice.get("logprobs") or {})
        ids = choice.get("token_ids")
        if ids is None and (entries or not choice["text"]):
            ids = [entry.id for entry in entries]
        said = Said(choice["text"], ids, entries, reason=choice.get("finish_reason"))
        if said.reason == "stop" and not isinstance(choice.get("stop_reason"), str):
            last = ids[-1] if ids else None
            said.reason = "stop" if stop and last not in self._tokenizer.eog_ids else "eos"
        return said


def _of_choice(logprobs: Mapping[str, Any]) -> list[Entry]:
    """Entries whose tokens are told by id: in llama.cpp's form, or as "token_id:123" in OpenAI's."""
    if "content" in logprobs:
        return by_id(logprobs["content"] or ())
    names = logprobs.get("tokens") or ()
    if not names or not all(str(name).startswith(NUMBERED) for name in names):
        return []
    tops = logprobs.get("top_logprobs") or [{}] * len(names)
    told = zip(names, logprobs["token_logprobs"], tops, strict=True)
    return [
        entry_of(_number(name), value, ((_number(each), lp) for each, lp in (top or {}).items()))
        for name, value, top in told
    ]


def _number(name: str) -> int:
    return int(name.removeprefix(NUMBERED))


def connected(link: Link, target: Target, tokenizer: Tokenizer, pid: int | None) -> Channel:
    """The channel to a server, in the dialect that it turns out to speak.

    Raises:
        EngineError: it speaks none of them, or cannot be reached.
        UsageError: it serves several models, and the spec names none.
    """
    dialect: type[Dialect] = LlamaCpp
    try:
        found = link.ask("/props")
        if not isinstance(found, dict) or "default_generation_settings" not in found:
            dialect = OpenAI
    except (MissingCapability, InvalidParameter):
        dialect = OpenAI
    try:
        return dialect(link, target, tokenizer, pid)
    except MissingCapability as error:
        raise EngineError(
            "neither llama.cpp's server nor OpenAI's completions", where=link.name,
            expected="/props or /v1/models", got=error.what,
        ) from None  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        got = link.hidden(f"{type(error).__name__}: {error}")
        raise EngineError("it describes itself in another form", where=link.name, got=got) from None
