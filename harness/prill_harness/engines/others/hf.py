"""`hf`: Hugging Face transformers on the GGUF file itself, read by its own reader, on a CPU or a GPU.

The second reading of the suite `witness` gives transformers the weights that prill read. Here it is the
engine under test: what its reader drops or misreads is its own mistake.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.channels.python import made_of
from prill_harness.engines.remote import Channel, Remote, Target
from prill_harness.engines.spec import check_device
from prill_harness.records.names import look_up
from prill_runtime.errors import UsageError

TOLD = 20  # best ids whose logprobs are told at each position
DTYPES = {"float32": "float32", "float64": "float64", "half": "bfloat16"}
CONFIG = {
    "vocab_size": "vocab_size", "hidden_size": "width", "num_hidden_layers": "n_layers",
    "max_position_embeddings": "context_length", "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads", "head_dim": "head_dim", "rms_norm_eps": "norm_eps",
    "layer_norm_epsilon": "norm_eps", "intermediate_size": "ffn", "tie_word_embeddings": "tied_head",
    "sliding_window": "window",
}  # fmt: skip
"""Its names of configuration values, and the runtime's."""
Array = NDArray[Any]


def require(what: str, where: str) -> None:
    """Refuse to go on without transformers.

    Raises:
        UsageError: its packages are not installed.
    """
    missing = [package for package in ("torch", "transformers") if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(
            f"{what} needs packages that are not installed", where=where, expected="torch and transformers",
            got=f"no {' and no '.join(missing)}", hint="pip install 'prill[hf]'",
        )  # fmt: skip


class HuggingFace(Remote, spec="hf"):
    """transformers in this process: `hf`, `hf:cuda`, `hf:cpu,arithmetic=float64`."""

    connector = "hf"

    @classmethod
    def target(cls, argument: str) -> Target:
        if not argument or "=" in argument.partition(",")[0]:
            argument = f"cpu,{argument}" if argument else "cpu"
        return super().target(argument)

    @classmethod
    def accepts(cls, argument: str) -> None:
        target = cls.target(argument)
        check_device(target.what)
        look_up(target.arithmetic or "float32", DTYPES, "transformers does not compute so", where="hf")
        require("the engine hf", "hf")

    @classmethod
    def connect(cls, target: Target, path: str) -> Channel:
        kind = DTYPES[target.arithmetic or "float32"]
        return made_of(lambda model: Transformers(model, target.what, kind), cls.connector, path)


class Transformers:
    """A causal model and its tokenizer as `from_pretrained` makes them of a GGUF file.

    Args:
        device: as PyTorch names it. kind: PyTorch's name of the type that it computes in.
    """

    name, draws = "transformers", "own"

    def __init__(self, model: str, device: str = "cpu", kind: str = "float32") -> None:
        os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        path = Path(model)
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        loaded = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, kind))
        self._torch, self._tokenizer = torch, transformers.AutoTokenizer.from_pretrained(**where)
        self._model = loaded.to(device).eval()
        self.version, self.device = version("transformers"), device
        self.arithmetic = next(name for name, dtype in DTYPES.items() if dtype == kind)
        self.config = configuration(loaded.config)

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=add_special)["input_ids"])

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def logits(self, ids: Sequence[int]) -> Array:
        with self._torch.no_grad():
            return plain(self._model(self._given(ids), use_cache=False).logits[0])

    def trace(self, ids: Sequence[int]) -> Iterator[tuple[str, Array]]:
        with hooked(self._model) as shown, self._torch.no_grad():
            self._model(self._given(ids), use_cache=False)
        return iter(shown)

    def generate(
        self,
        ids: Sequence[int],
        max_tokens: int,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> Mapping[str, Any]:
        if not max_tokens:
            return {"ids": [], "logprobs": [], "finish_reason": "length"}
        drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p or None}
        chosen = {"do_sample": True, **drawn} if temperature else {"do_sample": False}
        if stop:
            chosen |= {"stop_strings": list(stop), "tokenizer": self._tokenizer}
        if ignore_eos:  # None would be the file's own again
            chosen["eos_token_id"] = self._model.config.get_text_config().vocab_size
        self._torch.manual_seed(seed % 2**63)
        with self._torch.no_grad():
            made = self._model.generate(
                self._given(ids), max_new_tokens=max_tokens, repetition_penalty=repetition_penalty,
                output_logits=True, return_dict_in_generate=True, **chosen,
            )  # fmt: skip
        written = made.sequences[0, len(ids) :].tolist()
        rows = self._torch.stack(made.logits)[:, 0].float().log_softmax(-1)
        ends = self._model.generation_config.eos_token_id
        over = not ignore_eos and written[-1] in (ends if isinstance(ends, list) else [ends])
        reason = "eos" if over else "length" if len(written) == max_tokens else "stop"
        said = {"finish_reason": reason, "end_id": written.pop() if over else None}
        best = rows.topk(min(TOLD, rows.shape[-1]))
        top = [
            list(zip(*pair, strict=True))
            for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        logprobs = [float(rows[at, token]) for at, token in enumerate(written)]
        return {**said, "ids": written, "logprobs": logprobs, "top": top[: len(written)]}

    def _given(self, ids: Sequence[int]) -> Any:
        return self._torch.tensor([list(ids)], device=self._model.device)


def configuration(own: Any) -> dict[str, int | float | str | bool]:
    """What a transformers configuration says, by the runtime's names."""
    text = own.get_text_config()
    found = {
        ours: value for theirs, ours in CONFIG.items() if (value := getattr(text, theirs, None)) is not None
    }
    base = (getattr(text, "rope_parameters", None) or {}).get("rope_theta")
    return found if base is None else {**found, "rope_base": float(base)}


@contextmanager
def hooked(model: Any) -> Iterator[list[tuple[str, Array]]]:
    """What every module of a PyTorch model returns while it computes, and what goes into those without parts,
    by the modules' names; `NAME.input` for what goes in."""
    shown: list[tuple[str, Array]] = []

    def keep(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) and value else getattr(value, "logits", value)
        if hasattr(value, "detach"):
            shown.append((name, plain(value)))

    def before(name: str) -> Callable[..., None]:
        return lambda module, given: keep(f"{name}.input", given)

    def behind(name: str) -> Callable[..., None]:
        return lambda module, given, made: keep(name, made)

    hooks = []
    for name, module in model.named_modules():
        alone = not list(module.children())
        if name and alone:
            hooks.append(module.register_forward_pre_hook(before(name)))
        if name and (alone or name.rpartition(".")[2].isdigit()):
            hooks.append(module.register_forward_hook(behind(name)))
    try:
        yield shown
    finally:
        for hook in hooks:
            hook.remove()


def plain(tensor: Any) -> Array:
    """A tensor's copy as an array, in single precision where NumPy has no such type."""
    kept = tensor.detach().float() if str(tensor.dtype) == "torch.bfloat16" else tensor.detach()
    return np.array(kept.cpu().numpy())
