"""Faults of the code that engine and oracle share: on a user's own file both are wrong alike.

Such a fault is not suspended for the oracle: it is planted in everything that the process runs of the
runtime, and only a reading of the file that shares nothing with it can tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prill_harness.planting.faults import COMMON, Patch, fault, planted_in_both
from prill_harness.planting.tools import ONE, WINDOW, op, wiring

BLAMES = ("oracle",)
IN_BOTH = (
    "rope_base_default", "rope_pairing", "rope_exponent", "rope_wrong_way", "attention_scale_1_over_d",
    "attention_not_scaled", "gqa_interleaved", "kv_heads_ignored", "mask_off_by_one", "rms_eps_too_small",
    "rms_eps_outside_root", "rms_mean_subtracted", "norm_weight_offset", "layer_norm_no_bias",
    "variance_n_minus_1", "gate_up_swapped", "silu_without_gate", "gelu_erf", "linear_bias_dropped",
    "embed_scaled", "learned_positions_from_one", "logits_scaled", "logits_capped",
    "sinks_left_out", "window_in_other_layers", "yarn_bounds_rounded", "softmax_before_choice",
    "one_expert_less", "expert_bias_dropped", "clamp_of_gate_alone", "linear_half_not_raised",
    "scores_not_capped", "heads_normed_together", "post_norms_left_out", "second_base_ignored",
    "logits_not_capped",
)  # fmt: skip

for each in IN_BOTH:
    planted_in_both(each, BLAMES)


@fault(area=COMMON, blames=BLAMES, models=(*WINDOW, *ONE))
def common_window_ignored() -> Iterator[Patch]:
    """Engine and oracle alike: the file's sliding window is not looked at."""
    yield op("attention", lambda o, self, *given, window=None, **rest: o(self, *given, **rest))


@fault(area=COMMON, blames=BLAMES, models=(*WINDOW, *ONE), needs=("rope",))
def common_rope_freqs_ignored() -> Iterator[Patch]:
    """Engine and oracle alike: the file's divisors of the rotary frequencies are not looked at."""
    yield op("rope", lambda o, self, *given, freq_factors=None, **rest: o(self, *given, **rest))


@fault(area=COMMON, blames=BLAMES, models=(*WINDOW, *ONE), needs=("rope",))
def common_rope_factor_ignored() -> Iterator[Patch]:
    """Engine and oracle alike: positions are not divided by the file's scaling factor."""
    yield op("rope", lambda o, self, *given, factor=1.0, **rest: o(self, *given, **rest))


@fault(area=COMMON, blames=BLAMES)
def common_residual_of_norm() -> Iterator[Patch]:
    """Engine and oracle alike: the residual connection starts from the normed stream."""
    last: dict[str, Any] = {}

    def normed(original: Any, self: Any, *given: Any) -> Any:
        last["normed"] = original(self, *given)
        return last["normed"]

    def add(original: Any, self: Any, a: Any, b: Any) -> Any:
        return original(self, last.pop("normed", a), b)

    yield op("rms_norm", normed)
    yield op("layer_norm", normed)
    yield op("add", add)


@fault(area=COMMON, blames=BLAMES, models=WINDOW, needs=("rms_norm",))
def common_eps_by_default() -> Iterator[Patch]:
    """Engine and oracle alike: the norms' epsilon is 1e-5 whatever the file says."""
    yield op("rms_norm", lambda o, self, x, weight, eps: o(self, x, weight, 1e-5))


def _without(name: str) -> Patch:
    """A model that was loaded without this tensor of its layers."""

    def forget(weights: Any) -> None:
        for full in [full for full in weights if full.endswith(f".{name}")]:
            del weights[full]

    return wiring(forget)


@fault(area=COMMON, blames=BLAMES, needs=("bias",), lacks=("fused_qkv",))
def common_query_bias_ignored() -> Iterator[Patch]:
    """Engine and oracle alike: the bias of the queries is not looked at."""
    yield _without("attn_q.bias")


@fault(area=COMMON, blames=BLAMES, needs=("bias",), lacks=("fused_qkv",))
def common_key_bias_ignored() -> Iterator[Patch]:
    """Engine and oracle alike: the bias of the keys is not looked at."""
    yield _without("attn_k.bias")


@fault(area=COMMON, blames=BLAMES, needs=("bias",), lacks=("fused_qkv",))
def common_value_bias_ignored() -> Iterator[Patch]:
    """Engine and oracle alike: the bias of the values is not looked at."""
    yield _without("attn_v.bias")


@fault(area=COMMON, blames=BLAMES, needs=("bias",), lacks=("fused_qkv",))
def common_output_bias_ignored() -> Iterator[Patch]:
    """Engine and oracle alike: the bias of the attention's output is not looked at."""
    yield _without("attn_output.bias")
