"""A model and an engine come in; the sha256 of every number they compute of fixed ids goes out."""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from prill_harness import open_engine
from prill_harness.engines.embedded import Embedded
from prill_runtime.device.machine import compile as kernels
from prill_runtime.device.model import DeviceModel
from prill_runtime.quants.layouts import supported_types

from . import tiny_gguf
from .decoded import decoded
from .test_device_types import MIXES, matrix
from .test_device_types import write as mixed

ENGINES = ("numpy", "numpy64", "emu", "emu:fast")
TYPES = ("f16", "f32", "bf16", "q8_0", "q4_0", "q4_k", "q6_k")
FIXTURES = (*(f"{name}:{kind}" for name in ("llama-tiny", "gpt2-tiny") for kind in TYPES), "llama-window",
            "llama-long")  # fmt: skip
SIZES = {"width": 256, "n_heads": 4, "ffn": 512, "n_layers": 2, "context": 64}
PROMPT, STEPS, SEED = 20, 4, 7  # enough rows for the tiles of the fast arithmetic
Maker = Callable[[Path], Path]
LATER = (T.IQ4_NL, T.IQ4_XS)  # came after the record, which is of another machine's arithmetic


def _blocks(arch: str, kind: T) -> Maker:
    """A model of random blocks of one type; norms and biases are ordinary."""

    def make(path: Path) -> Path:
        random, sizes = np.random.default_rng(SEED), {**SIZES, "n_kv_heads": 2 if arch == "llama" else 4}
        writer = gguf.GGUFWriter(path, arch)
        tiny_gguf.add_config(writer, arch, sizes)
        tiny_gguf.add_tokenizer(writer, arch, 320)
        tensors = {"llama": tiny_gguf.llama_tensors, "gpt2": tiny_gguf.gpt2_tensors}[arch](sizes, 320, random)
        for name, array in tensors.items():
            if array.ndim == 1:
                writer.add_tensor(name, array)
                continue
            writer.add_tensor(name, matrix(random, kind, (array.shape[0], array.shape[1])), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


def _every_option(tensors: dict[str, NDArray[np.float32]]) -> None:
    """Everything that a Llama may have and seldom has."""
    tensors["rope_freqs.weight"] = np.linspace(1, 2, 4, dtype=np.float32)
    for name in [name for name in tensors if name.startswith("blk.") and "norm" not in name]:
        tensors[name.replace("weight", "bias")] = np.full(len(tensors[name]), 0.1, np.float32)


def _options(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_dimension_count(8)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)
    writer.add_sliding_window(5)


def _own_head(tensors: dict[str, NDArray[np.float32]]) -> None:
    tensors["output.weight"] = tensors["token_embd.weight"][::-1].copy()


def _tied(tensors: dict[str, NDArray[np.float32]]) -> None:
    del tensors["output.weight"]


MADE: dict[str, Maker] = {
    "llama": tiny_gguf.tiny,
    "llama q8_0": lambda path: tiny_gguf.tiny(path, type=T.Q8_0),
    "llama tied": lambda path: tiny_gguf.tiny(path, edit=_tied),
    "llama every option": lambda path: tiny_gguf.tiny(path, edit=_every_option, metadata=_options),
    "llama window q4_0": lambda path: tiny_gguf.tiny(path, metadata=_options, type=T.Q4_0),
    "gpt2": lambda path: tiny_gguf.tiny(path, "gpt2"),
    "gpt2 own head": lambda path: tiny_gguf.tiny(path, "gpt2", edit=_own_head),
    **{f"llama mix {mix}": lambda path, mix=mix: mixed(path, mix) for mix in MIXES},  # type: ignore[misc]
    **{f"{arch} of {kind.name.lower()}": _blocks(arch, kind) for arch in ("llama", "gpt2")
       for kind in supported_types() if kind not in (T.F32, T.F16, T.BF16, *LATER)},
}  # fmt: skip
MODELS = (*(f"fixture:{name}" for name in FIXTURES), *MADE)
# Each kind of arithmetic and of model once, in a few seconds.
FEW = (
    *((model, engine) for model in ("llama", "llama every option", "gpt2") for engine in ENGINES),
    *((model, engine) for model in ("llama q8_0", "llama window q4_0") for engine in ("numpy", "emu:fast")),
)


def digests(model: str, engine: str, folder: Path) -> dict[str, str]:
    """sha256 of the logits of a prompt, of those of each step behind it, and of all stages of the prompt."""
    spec = str(MADE[model](folder / "model.gguf")) if model in MADE else model
    with open_engine(engine, spec) as opened:
        assert isinstance(opened, Embedded)
        vocab = opened.model.vocab_size
        ids = np.random.default_rng(SEED).integers(3, vocab, PROMPT + STEPS).tolist()
        prompt, rest = ids[:PROMPT], ids[PROMPT:]
        stages = [part for name, array in opened.trace(prompt) for part in (name.encode(), array)]
        return {
            "prompt": _sha([opened.logits(prompt)]),
            "decode": _sha(list(_steps(opened, prompt, rest))),
            "stages": _sha(stages),
        }


def _steps(opened: Embedded, prompt: list[int], rest: list[int]) -> Iterator[NDArray[np.floating]]:
    model = opened.model
    cache = model.new_cache(PROMPT + STEPS)
    if isinstance(model, DeviceModel):
        model.prefill(cache, prompt)  # type: ignore[arg-type]
        for token in rest:
            yield decoded(model, cache, token)  # type: ignore[arg-type]
    else:
        model.forward([(cache, prompt)])
        for token in rest:
            yield model.forward([(cache, [token])])[0]
    if isinstance(model, DeviceModel):
        cache.close()  # type: ignore[attr-defined]


def _sha(parts: list[bytes | NDArray[np.floating]]) -> str:
    made = hashlib.sha256()
    for part in parts:
        made.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
    return made.hexdigest()


def arithmetic(engine: str) -> str:
    """sha256 of fixed sums and functions by the arithmetic under an engine; other machines' may differ.

    NumPy's is that of its BLAS, by as many threads as it may use, and of its own loops; the emulator's that
    of the compiler and of the C library's functions. Nothing of prill takes part, so prill cannot change it.
    """
    random = np.random.default_rng(1)
    if engine.startswith("numpy"):
        dtype = np.float64 if engine == "numpy64" else np.float32
        threads = os.environ.get("OPENBLAS_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "all"))
        found: list[bytes | NDArray[np.floating]] = [np.__version__.encode(), threads.encode()]
        for rows, depth, outs in ((1, 64, 96), (1, 512, 320), (20, 96, 64), (20, 256, 320), (7, 1000, 33)):
            x, w = (random.standard_normal(shape).astype(dtype) for shape in ((rows, depth), (outs, depth)))
            found += [x @ w.T, np.exp(x), np.tanh(x), np.cos(x), np.add.reduce(x * x, axis=-1)]
        large = [random.standard_normal(shape).astype(dtype) for shape in ((96, 512), (512, 640))]
        heads = random.standard_normal((4, 20, 16)).astype(dtype)
        found += [large[0] @ large[1], heads @ heads.swapaxes(1, 2), np.mean(heads, axis=-1)]
        return _sha(found)
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    values: list[float] = []
    for name, kind in (("expf", ctypes.c_float), ("tanhf", ctypes.c_float), ("sqrtf", ctypes.c_float),
                       ("cos", ctypes.c_double), ("sin", ctypes.c_double), ("exp", ctypes.c_double),
                       ("log", ctypes.c_double)):  # fmt: skip
        function = getattr(library, name)
        function.argtypes, function.restype = [kind], kind
        values += [function(float(x)) for x in np.abs(random.standard_normal(2000)) * 4]
    return _sha([kernels.compiler("g++")[1].encode(), np.array(values)])
