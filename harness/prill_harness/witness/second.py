"""The second reading: logits that Hugging Face transformers computes from a file.

Transformers supplies a forward pass that is not prill's. Its own GGUF reader is not used: it silently drops
what it has no name for (a window, biases, frequency factors), which would then be blamed on the oracle.
Configuration and weights, dequantised by `gguf`, are passed in here; what its models cannot express is
refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.others import hf
from prill_harness.records.names import look_up
from prill_harness.witness.published import FAMILIES, build, present
from prill_harness.witness.reading import Reading
from prill_runtime.errors import Inconclusive

Floats = NDArray[np.float64]
NAMES = ("hf",)
SECOND_VARIABLE = "PRILL_SECOND"  # set by --second, so that every cell sees it
MOST_PARAMETERS = 1 << 28  # of a model that is built whole, in float64: 2 GiB
MOST_BUILT = 1 << 31  # of its first layers, which is all that a larger one is judged by: 16 GiB


def ask(name: str) -> None:
    """Have every cell started from now on judge the oracle by a second reading.

    Raises:
        UsageError: no such reading, or its packages are not installed.
    """
    look_up(name, NAMES, "no such second reading", where="--second")
    hf.require("the second reading", "--second")
    os.environ[SECOND_VARIABLE] = name


def asked() -> str:
    """The second reading asked for; empty if none was."""
    return os.environ.get(SECOND_VARIABLE, "")


def knows(reading: Reading) -> bool:
    """Whether transformers has a model for the architecture."""
    return reading.architecture in FAMILIES


def parameters(reading: Reading) -> int:
    """Number of values in all tensors of a file, as far as its layers go."""
    return sum(int(np.prod(reading.tensors[name].shape)) for name in present(reading))


def logits(reading: Reading, ids: Sequence[int]) -> Floats:
    """Row i predicts the token after ids[i]: (len(ids), vocabulary). Its norms and softmax are float32.

    Raises:
        Inconclusive: transformers has no model for the architecture, or lacks something the file declares; or
            its model would not fit into memory.
    """
    if not knows(reading):
        raise Inconclusive(
            "no model of transformers stands for the architecture",
            expected=" or ".join(FAMILIES),
            got=reading.architecture,
        )
    if (count := parameters(reading)) > MOST_BUILT:
        raise Inconclusive(
            "the model is too large for transformers in float64",
            expected=f"at most {MOST_BUILT} parameters",
            got=count,
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    try:
        model = build(reading)
    except Inconclusive:
        raise
    except Exception as error:  # its validators raise all kinds of errors
        said = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise Inconclusive("transformers refuses the model", got=said[0].strip()) from error
    windowed = reading.architecture == "llama" and int(reading.key("attention.sliding_window", 0))
    mask = torch.from_numpy(_mask(len(ids), windowed)) if windowed else None
    # Its Gemma 3 has the number and leaves it out; its attention caps where it is told.
    cap = model.config.attn_logit_softcapping if reading.architecture == "gemma3" else None
    told = {"softcap": cap} if cap else {}
    with torch.no_grad():
        out = model(torch.tensor([list(ids)]), attention_mask=mask, use_cache=False, **told).logits[0]
    return np.asarray(out.numpy(), np.float64)


def _mask(n: int, window: int) -> Floats:
    """What to add to scores: (1, 1, n, n), −inf where a query does not see a key. Its Llama has no window."""
    query, key = np.arange(n)[:, None], np.arange(n)
    seen = (key <= query) & (key > query - window)
    return np.where(seen, 0.0, np.finfo(np.float64).min)[None, None]
