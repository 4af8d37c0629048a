"""Small bugs for the engine under test, each beside the checks that must not pass over it: for tests.

A fault patches what runs in float32 only, so that the float64 oracle in the same process stays right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import prill_runtime.run.generate as generation
from prill_harness.engines import models
from prill_harness.engines.base import Engine
from prill_harness.engines.embedded import EmbeddedSession, NumPy, NumPy64
from prill_harness.faults.planted.model import file as damage
from prill_harness.leaks.reports.report import PathReport, Probe
from prill_runtime.errors import PrillError
from prill_runtime.gguf.file import GGUFFile
from prill_runtime.models.cache import KVCache
from prill_runtime.ops.numpy import NumpyBackend
from prill_runtime.quants import layouts as quants
from prill_runtime.sampling import philox, sampler
from prill_runtime.tokenizer import vocabulary as tokenizer_vocab
from prill_runtime.tokenizer.load import TextStream

Patch = pytest.MonkeyPatch
Probing = Callable[[Probe], PathReport]
FAULTS: dict[str, tuple[Callable[[Patch], None], tuple[str, ...]]] = {}


def breaks(*checks: str) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """Declare a fault by its function's name, and the checks that must see it."""

    def declare(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
        FAULTS[plant.__name__] = (plant, checks)
        return plant

    return declare


def wrap(patch: Patch, owner: Any, name: str, changed: Callable[..., Any]) -> None:
    """Replace a method by `changed(original, self, *arguments, **named)`."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *a, **k: changed(original, *a, **k))


def op(patch: Patch, name: str, changed: Callable[..., Any]) -> None:
    """Replace an op of float32 backends by `changed(original, self, *arguments, **named)`."""

    def chosen(original: Any, self: NumpyBackend, *a: Any, **k: Any) -> Any:
        return (changed(original, self, *a, **k)) if self.dtype == np.float32 else original(self, *a, **k)

    wrap(patch, NumpyBackend, name, chosen)


@breaks("tokenizer.prompt_ids", "tokenizer.bos_once", "tokens.prompt_ids")
def bos_missing(patch: Patch) -> None:
    wrap(patch, NumPy, "tokenize", lambda o, s, text, add_special=True: o(s, text, add_special=False))


@breaks("tokenizer.merges", "tokenizer.special_whole", "tokenizer.round_trip")
def merge_order(patch: Patch) -> None:
    wrap(
        patch,
        NumPy,
        "tokenize",
        lambda o, s, text, add_special=True: [i for c in text for i in o(s, c, False)],
    )


@breaks("tokenizer.byte_fallback", "tokenizer.round_trip")
def byte_fallback_lost(patch: Patch) -> None:
    wrap(
        patch, NumPy, "tokenize", lambda o, s, t, add_special=True: o(s, t.encode("ascii", "ignore").decode())
    )


@breaks("tokenizer.ends")
def ends_forgotten(patch: Patch) -> None:
    patch.setattr(tokenizer_vocab, "ends", lambda stated, known: {})


@breaks("tokenizer.streaming")
def character_split_in_stream(patch: Patch) -> None:
    wrap(patch, TextStream, "push", lambda o, s, i: s._reader.read(i).decode("utf-8", "replace"))


@breaks("file.weights", "blocks.dequantize", "ops.matvec", "tokens.teacher_forced", "stages.early")
def weight_flipped(patch: Patch) -> None:
    def flipped(original: Any, self: Any, raw: Any, info: Any) -> Any:
        weight = original(self, raw, info)
        weight.flat[0] = -weight.flat[0] - 1
        return weight

    op(patch, "weight", flipped)


@breaks("file.tensors", "file.weights")
def tensor_zero_filled(patch: Patch) -> None:
    op(patch, "weight", lambda o, s, raw, info: o(s, raw, info) * ("blk.1.ffn_down" not in info.name))


@breaks("file.scales")
def block_scale_enlarged(patch: Patch) -> None:
    def enlarge(raw: damage.Bytes) -> None:
        raw.view("<f2")[4096:4112] *= 4096

    original = models._fixture
    patch.setattr(
        models, "_fixture", lambda text: damage.damaged(original(text), "blk.2.ffn_gate.weight", enlarge)
    )


@breaks("file.digest", "file.engine_digest")
def file_swapped(patch: Patch) -> None:
    patch.setattr(GGUFFile, "sha256", property(lambda self: "0" * 64))


@breaks("file.configuration", "tokens.config")
def rope_base_default(patch: Patch) -> None:
    original = NumPy.info.fget  # type: ignore[attr-defined]
    changed = {"rope_base": 10_000.0}
    patch.setattr(
        NumPy, "info", property(lambda s: replace(original(s), config=original(s).config | changed))
    )


@breaks("file.malformed", "errors.model_file")
def refusal_without_sentence(patch: Patch) -> None:
    def opened(argument: str, model: str) -> Engine:
        try:
            return original(argument, model)
        except PrillError as error:
            raise ValueError("broken") from error

    original = NumPy.open
    patch.setattr(NumPy, "open", opened)


@breaks("blocks.all_types")
def block_type_missing(patch: Patch) -> None:
    patch.delitem(
        quants.BlockFormat.registry, next(t for t in quants.BlockFormat.registry if t.name == "MXFP4")
    )


@breaks("ops.embed", "stages.early")
def embed_off_by_one(patch: Patch) -> None:
    op(patch, "embed", lambda o, s, table, ids: o(s, table, (ids + 1) % len(table)))


@breaks("ops.rms_norm", "tokens.teacher_forced", "stages.early")
def rms_eps_too_small(patch: Patch) -> None:
    op(patch, "rms_norm", lambda o, s, x, weight, eps: o(s, x, weight, eps / 10))


@breaks("ops.layer_norm")
def layer_norm_no_bias(patch: Patch) -> None:
    op(patch, "layer_norm", lambda o, s, x, weight, bias, eps: o(s, x, weight, bias * 0, eps))


@breaks("ops.linear")
def linear_bias_dropped(patch: Patch) -> None:
    op(patch, "linear", lambda o, s, x, weight, bias=None: o(s, x, weight))


@breaks("ops.rope", "stages.early", "tokens.teacher_forced")
def rope_pairing(patch: Patch) -> None:
    other = {"norm": "neox", "neox": "norm"}
    op(patch, "rope", lambda o, s, x, p, *, layout, **k: o(s, x, p, layout=other[layout], **k))


@breaks("ops.rope", "stages.late", "tokens.late_positions")
def rope_late_positions_stuck(patch: Patch) -> None:
    op(patch, "rope", lambda o, s, x, p, **k: o(s, x, np.minimum(p, 256), **k))


@breaks("properties.prefill_decode", "properties.chunking")
def rope_position_restarts(patch: Patch) -> None:
    op(patch, "rope", lambda o, s, x, p, **k: o(s, x, p - p[0], **k))


@breaks("properties.position_offset", "ops.rope")
def rope_keys_not_rotated(patch: Patch) -> None:
    op(patch, "rope", lambda o, s, x, p, **k: x if x.shape[1] != 4 else o(s, x, p, **k))


@breaks("ops.softmax", "ops.attention")
def softmax_no_max(patch: Patch) -> None:
    def unshifted(original: Any, self: Any, x: Any) -> Any:
        with np.errstate(all="ignore"):
            return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)

    op(patch, "softmax", unshifted)


@breaks("ops.attention", "ops.decode", "stages.early")
def attention_scale_1_over_d(patch: Patch) -> None:
    op(patch, "attention", lambda o, s, *a, scale, **k: o(s, *a, scale=scale**2, **k))


@breaks("ops.swiglu", "stages.early")
def gate_up_swapped(patch: Patch) -> None:
    op(patch, "swiglu", lambda o, s, gate, up: o(s, up, gate))


@breaks("ops.gelu_tanh")
def gelu_sigmoid(patch: Patch) -> None:
    op(patch, "gelu_tanh", lambda o, s, x: o(s, x) * np.float32(1.001))


@breaks("ops.add", "stages.early")
def residual_dropped(patch: Patch) -> None:
    op(patch, "add", lambda o, s, a, b: b.copy())


@breaks("properties.batch")
def batch_rows_mixed(patch: Patch) -> None:
    wrap(patch, NumPy, "logits_batch", lambda o, s, batch: o(s, batch)[::-1])


@breaks("errors.empty_prompt", "errors.id_out_of_vocabulary", "errors.too_long", "errors.sampling_parameters")
def errors_swallowed(patch: Patch) -> None:
    def silent(original: Any, self: Any, ids: Any, **named: Any) -> Any:
        try:
            return original(self, ids, **named)
        except PrillError:
            return np.zeros((len(ids), 1), np.float32)

    for name in ("logits", "generate"):
        wrap(patch, NumPy, name, silent)


def argument(patch: Patch, **changed: Any) -> None:
    """Have `generate` work with other arguments than it was given."""
    wrap(patch, NumPy, "generate", lambda o, s, ids, **k: o(s, ids, **(k | changed)))


def texts(patch: Patch, changed: Callable[[Any], Any]) -> None:
    """Change what is written, alone and in a batch."""
    wrap(patch, NumPy, "generate", lambda o, s, ids, **k: changed(o(s, ids, **k)))
    wrap(patch, NumPy, "generate_batch", lambda o, s, ids, **k: [changed(text) for text in o(s, ids, **k)])


@breaks("properties.same_seed", "sampler.engine_replay", "tokens.sampled")
def seed_ignored(patch: Patch) -> None:
    for module in (philox, sampler):
        wrap(patch, module, "philox_uniform", lambda o, seed, position: o(5, position))


@breaks("properties.end_of_text")
def eos_ignored(patch: Patch) -> None:
    argument(patch, ignore_eos=True)


@breaks("properties.stop_strings")
def stop_ignored(patch: Patch) -> None:
    argument(patch, stop=())


@breaks("properties.cancel")
def cancel_ignored(patch: Patch) -> None:
    argument(patch, on_token=None)


@breaks("properties.max_tokens", "cache.context_full")
def max_tokens_off_by_one(patch: Patch) -> None:
    wrap(
        patch,
        NumPy,
        "generate",
        lambda o, s, i, **k: o(s, i[:1000], **(k | {"max_tokens": k["max_tokens"] + 1})),
    )


@breaks("tokens.greedy")
def greedy_token_wrong(patch: Patch) -> None:
    texts(
        patch,
        lambda done: replace(
            done, ids=tuple((i + 1) % 300 if n == 60 else i for n, i in enumerate(done.ids))
        ),
    )


@breaks("properties.logprobs")
def logprob_base_two(patch: Patch) -> None:
    texts(patch, lambda done: replace(done, logprobs=tuple(value / np.log(2) for value in done.logprobs)))


@breaks("cache.exactly_full")
def capacity_unchecked(patch: Patch) -> None:
    patch.setattr(KVCache, "require", lambda self, rows: None)


@breaks("cache.sessions_apart")
def sessions_share_cache(patch: Patch) -> None:
    caches: dict[int, KVCache] = {}
    patch.setattr(
        EmbeddedSession, "cache", property(lambda s: caches.setdefault(id(s._model), s._model.new_cache()))
    )


@breaks("cache.reset")
def reset_forgets_nothing(patch: Patch) -> None:
    patch.setattr(EmbeddedSession, "reset", lambda self: None)


@breaks("cache.size")
def cache_twice_as_large(patch: Patch) -> None:
    wrap(
        patch,
        KVCache,
        "__init__",
        lambda o, s, n, h, d, capacity, *a, **k: o(s, n, h, d, 2 * capacity, *a, **k),
    )


@breaks("sampler.philox", "sampler.draw", "sampler.backend", "sampler.engine_replay")
def philox_rounds(patch: Patch) -> None:
    patch.setattr(philox, "_ROUNDS", 7)


@breaks("sampler.greedy")
def tie_highest_id(patch: Patch) -> None:
    def last(original: Any, logits: Any, params: Any, *rest: Any) -> int:
        return (
            len(logits) - 1 - int(np.argmax(logits[::-1]))
            if not params.temperature
            else original(logits, params, *rest)
        )

    wrap(patch, generation, "sample", last)


@breaks("sampler.not_a_number")
def nan_logits_accepted(patch: Patch) -> None:
    wrap(patch, generation, "sample", lambda o, logits, *rest: o(np.nan_to_num(logits), *rest))


@breaks("sampler.filters", "sampler.penalty", "sampler.draw")
def penalty_wrong_sign(patch: Patch) -> None:
    wrap(patch, sampler, "_penalised", lambda o, logits, penalty, history: o(logits, 1 / penalty, history))


@breaks("sampler.full_vocabulary")
def top_p_truncated_list(patch: Patch) -> None:
    def truncated(original: Any, logits: Any, penalty: float, history: Any) -> Any:
        values = original(logits, penalty, history)
        values[50_000:] = -np.inf
        return values

    wrap(patch, sampler, "_penalised", truncated)


@breaks("stages.complete")
def stage_missing(patch: Patch) -> None:
    wrap(
        patch,
        NumPy64,
        "trace",
        lambda o, s, ids, *a: iter([p for p in o(s, ids, *a) if p[0] != "blk.1.attn"]),
    )


@breaks("stages.untouched")
def trace_pointers_alias(patch: Patch) -> None:
    def aliased(original: Any, self: Any, ids: Any, *rest: Any) -> Any:
        stages = list(original(self, ids, *rest))
        buffer = np.zeros(max(array.size for _, array in stages), np.float32)
        return iter(
            [(name, buffer[: a.size].reshape(a.shape) if "attn" in name else a) for name, a in stages]
        )

    wrap(patch, NumPy, "trace", aliased)


@breaks("tokens.golden_is_current")
def golden_from_broken_engine(patch: Patch) -> None:
    wrap(patch, NumPy64, "logits", lambda o, s, ids: o(s, ids) * 1.0001)
    wrap(patch, NumPy64, "decoded_logits", lambda o, s, *given: [row * 1.0001 for row in o(s, *given)])
