"""What follows from a model's nodes by a walk is what its architecture is known to have."""

from __future__ import annotations

from pathlib import Path

import pytest

from prill_runtime.gguf.file import open_gguf
from prill_runtime.models import walks
from prill_runtime.models.load import describe
from prill_runtime.models.nodes.network import Network

from .networks import network
from .tiny_gguf import tiny

ARCHS = ("llama", "gpt2")


@pytest.mark.parametrize("arch", ARCHS)
def test_what_follows_from_the_nodes(arch: str, tmp_path: Path) -> None:
    """Features, caches, and what stages are computed from, as the architecture is known to have them."""
    with open_gguf(tiny(tmp_path / "m.gguf", arch)) as file:
        network = describe(file)
    stages = walks.stages(network)
    if arch == "llama":
        assert walks.features(network) == {"rms_norm", "rope", "gqa", "silu", "gate"}
        assert stages["blk.1.attn"].inputs == ("blk.1.q_rope", "blk.1.k_rope", "blk.1.v")
        assert stages["blk.1.act"].inputs == ("blk.1.gate", "blk.1.up")
        assert stages["logits"].tensors == ("output",)
    else:
        fused = {"layer_norm", "learned_positions", "bias", "fused_qkv", "gelu_tanh", "tied"}
        assert walks.features(network) == fused
        assert stages["blk.0.k"].tensors == ("blk.0.attn_qkv",)
        assert stages["blk.1.act"].inputs == ("blk.1.up",)
        assert stages["embed"].tensors == ("token_embd", "position_embd")
    assert stages["blk.1.attn_norm"].inputs == ("blk.0.out",)
    assert stages["blk.1.ffn_in"].inputs == ("blk.0.out", "blk.1.attn_out")
    kept = {(c.kv_heads, c.key_size, c.value_size, c.window) for c in network.caches}
    assert kept == {(2 if arch == "llama" else 3, 16, 16, None)}


def test_the_tree_is_walked_once_for_its_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache is made for every text, and looked at in every step: neither walks the tree again."""
    found = network("llama")
    first = found.cache_shape
    monkeypatch.setattr(Network, "walk", lambda self: pytest.fail("walked again"))
    assert found.cache_shape == first
    assert len(found.caches) == first[0]
