"""`llamacpp:FOLDER`: libllama in a child process, whose stages are shown by `cb_eval`."""

from __future__ import annotations

import sys
from dataclasses import replace

from prill_harness.engines.channels.process import Spoken, Worker
from prill_harness.engines.others.llamacpp.library import find
from prill_harness.engines.remote import Channel, Remote, Target
from prill_runtime.gguf.file import open_gguf

WORKER = "prill_harness.engines.others.llamacpp.worker"


class OnLibLlama(Remote, spec="llamacpp"):
    """A folder with libllama and libggml, or the library itself.

    Caches are float32 and flash attention is off, so that nothing is rounded that the file's type does not
    round; with `arithmetic=half` both are the library's defaults.
    """

    connector = "llamacpp"
    takes = ("ctx",)

    @classmethod
    def accepts(cls, argument: str) -> None:
        find(cls.target(argument).what)

    @classmethod
    def connect(cls, target: Target, path: str) -> Channel:
        library = find(target.what)
        kind = "half" if target.arithmetic == "half" else "float32"
        words = [sys.executable, "-P", "-m", WORKER, str(library), target.declared.get("ctx", "0"), kind]
        spoken = Spoken(Worker(words, target.timeout, cls.connector), path, cls.connector)
        spoken.hello = replace(spoken.hello, arithmetic=_arithmetic(path, kind), draws="own")
        return spoken


def _arithmetic(path: str, kind: str) -> str:
    """What a file's products are made in: llama.cpp's CPU rounds activations to the type of the weights."""
    with open_gguf(path) as file:
        types = {tensor.type.name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if types <= {"F32"}:
        return kind
    return "half" if types <= {"F32", "F16", "BF16"} else "int8"
