"""The logits that decoding on a device leaves behind one token."""

from __future__ import annotations

from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from prill_runtime.device.model import DeviceModel
from prill_runtime.device.steps.cache import DeviceCache
from prill_runtime.sampling.sampler import SamplingParams


def decoded(model: DeviceModel, cache: DeviceCache, token: int) -> NDArray[np.float32]:
    """Decode one token as every text is decoded; the logits (vocab,) that its successor was chosen from."""
    with closing(model.decoder.stream(cache, [token], 1, SamplingParams())) as stream:
        ((chosen, _),) = stream
    logits = np.array(model.decoder.logits)[0]
    assert chosen == int(logits.argmax())
    return logits
