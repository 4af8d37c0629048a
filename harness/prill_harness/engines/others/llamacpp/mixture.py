"""A mixture's tensors as the runtime has them: a weight for each expert, and the chosen ones by their ids.

libllama has them in the order of their weights, and says in `ffn_moe_topk-N` whose each is. A name alone does
not tell that order, so they get the stages' own names here and stand in no table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

CHOSEN, LOGITS, WEIGHTS = "ffn_moe_topk", "ffn_moe_logits", "ffn_moe_weights"
KINDS = {"gate": "expert_gate", "up": "expert_up", "swiglu_oai": "expert_act", "swiglu": "expert_act",
         "down": "expert_down"}  # fmt: skip
_PART = re.compile(r"((ffn_moe_\w+?)(_biased|_softmax|_norm|_scaled)?)-(\d+) = (\w+)\(.*\)", re.DOTALL)
Shown = tuple[str, NDArray[np.floating]]


def by_expert(shown: Iterable[Shown]) -> Iterator[Shown]:
    """The tensors of a pass, those of mixtures under the names of stages and in the runtime's order.

    Of a product and the one with its bias, and of weights and the normalised ones, the last is the stage. A
    mixture without the ids of its experts is left as it is.
    """
    tensors = list(shown)
    parts = {at: found for at, (name, _) in enumerate(tensors) if (found := _PART.fullmatch(name))}
    ids = {found[4]: tensors[at][1].astype(int) for at, found in parts.items() if found[2] == CHOSEN}
    count = {found[4]: tensors[at][1].shape[1] for at, found in parts.items() if found[2] == LOGITS}
    last = {(found[2], found[4]): at for at, found in parts.items()}
    for at, (name, rows) in enumerate(tensors):
        found = parts.get(at)
        layer = found[4] if found else ""
        if found is None or layer not in ids or layer not in count or found[2] == LOGITS:
            yield name, rows
        elif found[2] == WEIGHTS and last[found[2], layer] == at:
            whole = np.zeros((len(rows), count[layer]), rows.dtype)
            np.put_along_axis(whole, ids[layer], rows, axis=1)
            yield _named(layer, "routed", found), whole
        elif (kind := KINDS.get(found[2].removeprefix("ffn_moe_"))) and last[found[2], layer] == at:
            order = np.argsort(ids[layer], axis=1)[..., None]
            each = rows.reshape(*ids[layer].shape, -1)
            yield _named(layer, kind, found), np.take_along_axis(each, order, axis=1).reshape(rows.shape)
        elif found[2] not in (CHOSEN, WEIGHTS):
            yield name, rows


def _named(layer: str, kind: str, found: re.Match[str]) -> str:
    return f"blk.{layer}.{kind} = {found[5]}({found[1]}-{layer})"
