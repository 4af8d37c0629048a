"""llama.cpp's own server, of the package xllamacpp.

    python llamacpp_server.py MODEL PORT CONTEXT [float32]

With `float32` nothing is rounded on purpose: float32 caches, no flash attention.
"""

from __future__ import annotations

import sys
import threading

import xllamacpp


def main(model: str, port: str, context: str, arithmetic: str = "") -> None:
    asked = xllamacpp.CommonParams()
    asked.model.path, asked.port, asked.n_ctx, asked.n_parallel = model, int(port), int(context), 1
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
    if arithmetic:
        asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(asked)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
