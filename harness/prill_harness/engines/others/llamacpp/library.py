"""libllama by ctypes: its functions, and its structs as far as their layout is understood.

The C API has no version of its structs, and their fields move. So defaults are asked of the library, offsets
are found by the defaults that are known, and what is written there is held against what the library then does
(`worker.Llama`). A layout that reads as none of the known ones is refused before anything is written.
"""

from __future__ import annotations

import ctypes as c
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prill_runtime.errors import UsageError

PLACES = (".", "lib", "bin")  # where below FOLDER libraries lie
LIBRARY = ("libllama.so*", "libllama*.dylib")
BENEATH = ("libggml-base.", "libggml.")  # what libllama needs, in the order of loading
P, INT, SIZE, TEXT = c.c_void_p, c.c_int32, c.c_size_t, c.c_char_p
F32, F16, I32 = 0, 1, 26  # of enum ggml_type

LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, P)
EVAL = c.CFUNCTYPE(c.c_bool, P, c.c_bool, P)


class Params(c.Structure):
    """Any params struct, and room behind it; by value it goes on the stack, where more room does no harm."""

    _fields_ = (("words", c.c_uint32 * 128),)


class ChainParams(c.Structure):
    """llama_sampler_chain_params: a bool, in one register with what may be added to it."""

    _fields_ = (("word", c.c_uint64),)


class Batch(c.Structure):
    """llama_batch, by value."""

    _fields_ = (
        ("count", INT), ("token", c.POINTER(INT)), ("embd", P), ("pos", c.POINTER(INT)),
        ("sequences", c.POINTER(INT)), ("sequence", c.POINTER(c.POINTER(INT))),
        ("logits", c.POINTER(c.c_int8)),
    )  # fmt: skip


class Candidate(c.Structure):
    """llama_token_data."""

    _fields_ = (("id", INT), ("logit", c.c_float), ("p", c.c_float))


class Candidates(c.Structure):
    """llama_token_data_array."""

    _fields_ = (
        ("data", c.POINTER(Candidate)), ("size", SIZE), ("selected", c.c_int64), ("sorted", c.c_bool),
    )  # fmt: skip


class GgmlTensor(c.Structure):
    """ggml_tensor up to its name; `tap.Tap` holds its sizes against what the library says of them."""

    _fields_ = (
        ("type", INT), ("buffer", P), ("ne", c.c_int64 * 4), ("nb", SIZE * 4), ("op", INT),
        ("op_params", INT * 16), ("flags", INT), ("src", P * 10), ("view_src", P), ("view_offs", SIZE),
        ("data", P), ("name", c.c_char * 64),
    )  # fmt: skip


SIGNATURES: Mapping[str, tuple[Any, ...]] = {
    "ggml_backend_load": (P, TEXT),
    "ggml_backend_reg_count": (SIZE,),
    "ggml_backend_tensor_get": (None, P, P, SIZE, SIZE),
    "ggml_get_name": (P, P),
    "ggml_nbytes": (SIZE, P),
    "ggml_nelements": (c.c_int64, P),
    "ggml_op_desc": (TEXT, P),
    "llama_backend_init": (None,),
    "llama_batch_free": (None, Batch),
    "llama_batch_init": (Batch, INT, INT, INT),
    "llama_context_default_params": (Params,),
    "llama_decode": (INT, P, Batch),
    "llama_detokenize": (INT, P, c.POINTER(INT), INT, TEXT, INT, c.c_bool, c.c_bool),
    "llama_free": (None, P),
    "llama_get_logits": (c.POINTER(c.c_float), P),
    "llama_get_memory": (P, P),
    "llama_init_from_model": (P, P, Params),
    "llama_log_set": (None, LOG, P),
    "llama_memory_clear": (None, P, c.c_bool),
    "llama_model_default_params": (Params,),
    "llama_model_free": (None, P),
    "llama_model_get_vocab": (P, P),
    "llama_model_load_from_file": (P, TEXT, Params),
    "llama_model_n_ctx_train": (INT, P),
    "llama_model_n_embd": (INT, P),
    "llama_model_n_head": (INT, P),
    "llama_model_n_head_kv": (INT, P),
    "llama_model_n_layer": (INT, P),
    "llama_n_batch": (c.c_uint32, P),
    "llama_n_ctx": (c.c_uint32, P),
    "llama_n_threads": (INT, P),
    "llama_n_ubatch": (c.c_uint32, P),
    "llama_sampler_accept": (None, P, INT),
    "llama_sampler_apply": (None, P, c.POINTER(Candidates)),
    "llama_sampler_chain_add": (None, P, P),
    "llama_sampler_chain_default_params": (ChainParams,),
    "llama_sampler_chain_init": (P, ChainParams),
    "llama_sampler_free": (None, P),
    "llama_sampler_init_dist": (P, c.c_uint32),
    "llama_sampler_init_greedy": (P,),
    "llama_sampler_init_min_p": (P, c.c_float, SIZE),
    "llama_sampler_init_penalties": (P, INT, INT, c.c_float, c.c_float, c.c_float),
    "llama_sampler_init_temp": (P, c.c_float),
    "llama_sampler_init_top_k": (P, INT),
    "llama_sampler_init_top_p": (P, c.c_float, SIZE),
    "llama_sampler_sample": (INT, P, P, INT),
    "llama_token_to_piece": (INT, P, INT, TEXT, INT, INT, c.c_bool),
    "llama_tokenize": (INT, P, TEXT, INT, c.POINTER(INT), INT, c.c_bool, c.c_bool),
    "llama_vocab_is_eog": (c.c_bool, P, INT),
    "llama_vocab_n_tokens": (INT, P),
}  # fmt: skip
"""What is asked of the library (llama.h, ggml.h, ggml-backend.h): result and arguments."""

_CALLED = {0: "0", 1: "1", 4: "4", 512: "h", 2048: "b", 0xFFFFFFFF: "n",
           0xBF800000: "m", 0x3F800000: "o", 0x42000000: "t"}  # fmt: skip
# llama_context_params as words of four bytes: n_ctx 512, n_batch 2048, n_ubatch 512, n_seq_max 1, counts
# that newer ones add, twice 4 threads, a kind of context in newer ones, enums that are -1 (flash attention
# the fourth, where it is one), rope's base and scale 0, YaRN's four, its context 0, defrag_thold -1, cb_eval
# and its data, the two types of the cache (F16, which is 1), the callback that aborts.
_CONTEXT = re.compile(
    r"hbh1[01]{0,4}?(?P<threads>44)0?nnn(?P<flash>n?)00m[mo][mt][mo]0m0?(?P<eval>0000)(?P<types>11)0000"
)
# llama_model_params: two pointers, how many layers go to a GPU, split_mode 1.
_MODEL = re.compile(r"0000.1")


@dataclass(frozen=True)
class Layout:
    """Words of llama_context_params, by their number; `flash` is None where that is no enum, but off."""

    threads: int
    flash: int | None
    eval: int
    types: int

    @classmethod
    def read(cls, context: bytes, model: bytes) -> Layout | None:
        """The layout by the defaults of both params structs; None if they read as no known one's."""
        found = _CONTEXT.match(_words(context))
        if found is None or _MODEL.match(_words(model)) is None or found.start("eval") % 2:
            return None
        flash = found.start("flash") if found["flash"] else None
        return cls(found.start("threads"), flash, found.start("eval"), found.start("types"))


def _words(data: bytes) -> str:
    """A letter for each word of four bytes, `?` for a value that no default has."""
    return "".join(_CALLED.get(word, "?") for (word,) in struct.iter_unpack("<I", data))


def find(given: str) -> Path:
    """The library in a folder, or the file that is given.

    Raises:
        UsageError: there is none.
    """
    where, path = repr(f"llamacpp:{given}"), Path(given).expanduser()
    if path.is_file():
        return path.resolve()
    if not path.is_dir():
        raise UsageError("no such folder", where=where, expected="a folder with libllama", got=repr(given))
    for pattern in LIBRARY:
        for place in PLACES:
            if found := sorted((path / place).glob(pattern)):
                return found[0].resolve()
    raise UsageError(
        "no libllama in the folder", where=where,
        expected=f"{' or '.join(LIBRARY)} in it, in its lib or in its bin", got=repr(given),
    )  # fmt: skip


class LibLlama:
    """A libllama that is loaded: its functions as attributes.

    Args:
        path: of the library; the others are looked for in the same folder, and beside it in lib and bin.

    Raises:
        UsageError: it cannot be loaded, has no CPU backend, lacks a function, has unknown structs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            for name in BENEATH:
                for file in sorted(path.parent.glob(f"{name}*")):
                    c.CDLL(str(file), mode=c.RTLD_GLOBAL)
            self._library = c.CDLL(str(path))
        except OSError as error:
            raise UsageError("libllama cannot be loaded", got=error) from None
        self.version = self._version()
        lacking = [name for name in SIGNATURES if not hasattr(self._library, name)]
        if lacking:
            raise self.refused("it lacks functions", "llama.h of 2025 or later", ", ".join(lacking[:4]))
        for name, (result, *arguments) in SIGNATURES.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        self._backend()
        context, model = self.llama_context_default_params(), self.llama_model_default_params()
        layout = Layout.read(bytes(context), bytes(model))
        if layout is None:
            seen = _words(bytes(context))[:36]
            raise self.refused("its params structs are laid out in no known way", "known defaults", seen)
        self.layout = layout

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in SIGNATURES:
            raise AttributeError(name)
        function: Callable[..., Any] = getattr(self._library, name)
        return function

    def refused(self, what: str, expected: str, got: str) -> UsageError:
        return UsageError(f"{what} ({self.path}, version {self.version})", expected=expected, got=got)

    def penalties(self, window: int, penalty: float) -> int:
        """The sampler that penalises the ids among the last `window`, at least the vocabulary's size.

        Since 2026 the vocabulary's size comes before the window, both in registers that floats do not use, so
        that one number in both places is right for either.
        """
        return int(self.llama_sampler_init_penalties(window, window, penalty, 0.0, 0.0) or 0)

    def penalises(self) -> bool:
        """Whether penalties do what they should: to a positive logit, a negative one, and an unseen id's."""
        given, expected = (2.0, -2.0, 2.0), (1.0, -4.0, 2.0)
        seen = (Candidate * 3)(*(Candidate(at, logit, 0.0) for at, logit in enumerate(given)))
        sampler = self.penalties(1024, 2.0)
        for token in (0, 1):
            self.llama_sampler_accept(sampler, token)
        self.llama_sampler_apply(sampler, c.byref(Candidates(seen, 3, -1, False)))
        self.llama_sampler_free(sampler)
        return tuple(each.logit for each in seen) == expected

    def _version(self) -> str:
        """What llama and ggml say of their versions."""
        said = []
        for name in ("llama_version", "ggml_version", "ggml_commit"):
            if (function := getattr(self._library, name, None)) is not None:
                function.restype = TEXT
                said.append(f"{name.partition('_')[0]} {(function() or b'').decode()}")
        return ", ".join(said) or "unknown"

    def _backend(self) -> None:
        """Load the CPU backend that suits this machine best, where it is a library of its own."""
        root = self.path.parent
        folders = [root, *(root.parent / place for place in PLACES[1:])]
        files = {file.resolve() for folder in folders for file in folder.glob("libggml-cpu*")}
        best = max(sorted(files), key=_score, default=None)
        if best is not None:
            self.ggml_backend_load(str(best).encode())
        if not self.ggml_backend_reg_count():
            raise self.refused("no CPU backend could be loaded", "libggml-cpu*", str(best or "none"))


def _score(path: Path) -> int:
    """How well a CPU backend suits this machine; 0: not at all."""
    try:
        library = c.CDLL(str(path))
    except OSError:
        return 0
    return int(library.ggml_backend_score()) if hasattr(library, "ggml_backend_score") else 1
