"""A checkout of llama.cpp comes in; a gpt-oss file of its converter's making goes out, as data for the tests.

    python suites/unit/converted.py LLAMA_CPP

The model is random, and small enough to be kept: a checkpoint as the published ones are, bfloat16 with
experts in MXFP4, and harmony's special tokens. Beside the file lies what transformers says of that
checkpoint; it has seen neither the file nor prill. One thing is told to the converter: the name of the
pre-tokenizer, which it otherwise knows by the ids that the published vocabulary makes of a text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

from prill_fixtures.corpus import document
from prill_runtime.tokenizer.pretokenizers import PRE_TOKENIZERS

DATA = Path(__file__).parent / "data"
FILE, LOGITS = DATA / "gpt-oss-converted.gguf", DATA / "gpt-oss-converted.npz"
MERGES, IDS = 90, 80
HARMONY = ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>",
           "<|end|>", "<|message|>", "<|call|>")  # fmt: skip


def tokenizer(folder: Path) -> int:
    """Train a vocabulary cut as o200k cuts, with harmony's marks behind it, and save it; its size."""
    import tokenizers
    from tokenizers import decoders, models, trainers
    from transformers import PreTrainedTokenizerFast

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = PRE_TOKENIZERS["gpt-4o"].build()
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=256 + MERGES, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([document(3, n) for n in range(4)], trainer)
    made.add_special_tokens(list(HARMONY))
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|startoftext|>", eos_token="<|return|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    return int(made.get_vocab_size())


def checkpoint(folder: Path, vocab: int) -> Any:
    """Write config.json and model.safetensors; the model of transformers that has these weights."""
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = transformers.GptOssConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=32,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=12, max_position_embeddings=512,
        attn_implementation="eager", experts_implementation="eager",
        rope_parameters={"rope_type": "yarn", "rope_theta": 150000.0, "factor": 8.0, "beta_fast": 32.0,
                         "beta_slow": 1.0, "original_max_position_embeddings": 64, "truncate": False},
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    random, state, stored = np.random.default_rng(11), {}, {}
    for name, parameter in model.named_parameters():
        values = random.standard_normal(tuple(parameter.shape))
        values *= 1.0 if "sinks" in name else 0.5 if "gate_up_proj" in name else 0.15  # some beyond the clamp
        values += 1.0 if "norm" in name else 0.0
        if values.ndim == 3:  # (expert, in, out)
            rows = np.ascontiguousarray(values.swapaxes(1, 2), np.float32)
            blocks, scales = packed(rows)
            stored |= {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": torch.from_numpy(scales)}
            state[name] = convert_moe_packed_tensors(*map(torch.from_numpy, (blocks, scales)))
        else:
            state[name] = stored[name] = torch.from_numpy(values).to(torch.bfloat16)
    model.load_state_dict(state, strict=False)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    written = config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16",
                                  "architectures": ["GptOssForCausalLM"]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written), "utf-8")
    return model.double().eval()


def packed(rows: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Blocks (expert, out, in / 32, 16), neighbours in one byte, and scales (expert, out, in / 32)."""
    made = gguf.quants.quantize(rows, T.MXFP4).reshape(*rows.shape[:2], -1, 17)
    halves = np.concatenate([made[..., 1:] & 15, made[..., 1:] >> 4], axis=-1)  # 32 values, in order
    return halves[..., ::2] | halves[..., 1::2] << 4, np.ascontiguousarray(made[..., 0])


def last_eight(model: Any, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What a model of transformers says behind the last eight ids: (8, vocabulary)."""
    import torch

    with torch.no_grad():
        found = model(torch.from_numpy(ids)[None], use_cache=False).logits[0, -8:].numpy()
    return np.asarray(found, np.float64)


def convert(checkout: Path, folder: Path, path: Path) -> None:
    """Run the converter of a checkout of llama.cpp, with the `gguf` that lies beside it, on a checkpoint."""
    named = "from conversion import base; base.TextModel.get_vocab_base_pre = lambda *_: 'gpt-4o'"
    run = "import runpy; runpy.run_path('convert_hf_to_gguf.py', run_name='__main__')"
    command = [sys.executable, "-c", f"{named}; {run}", str(folder), "--outfile", str(path), "--model-name",
               "gpt-oss converted"]  # fmt: skip
    where = {**os.environ, "PYTHONPATH": str(checkout / "gguf-py")}
    subprocess.run(command, cwd=checkout, env=where, check=True)


def main(checkout: Path) -> None:
    """Make both files anew."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocab = tokenizer(folder)
        model = checkpoint(folder, vocab)
        ids = np.random.default_rng(12).integers(0, vocab, IDS)
        np.savez_compressed(LOGITS, ids=ids, logits=last_eight(model, ids).astype(np.float32))
        convert(checkout, folder, FILE)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
