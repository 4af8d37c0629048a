"""The digest of a model file: the whole file's, and ended with it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from prill_runtime.errors import InvalidParameter
from prill_runtime.gguf import file as gguf_module
from prill_runtime.gguf.file import open_gguf

from .tiny_gguf import tiny


def test_the_digest_is_the_files(tmp_path: Path) -> None:
    """sha256 covers the whole file, and stays known after close."""
    path = tiny(tmp_path / "m.gguf")
    with open_gguf(path) as file:
        digest = file.sha256
    assert digest == file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_digest_ends_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed while another thread digests a large file, it is left after the piece in hand."""
    path = tiny(tmp_path / "m.gguf")
    whole, seen = hashlib.sha256(path.read_bytes()).hexdigest(), []
    real = hashlib.sha256

    class Watched:
        def __init__(self) -> None:
            self.digest = real()

        def update(self, piece: memoryview) -> None:
            self.digest.update(piece)
            seen.append(len(piece))
            if stopping:
                file.close()

        def hexdigest(self) -> str:
            return self.digest.hexdigest()

    monkeypatch.setattr(gguf_module, "DIGESTED_BYTES", 64)
    monkeypatch.setattr(gguf_module.hashlib, "sha256", Watched)
    for stopping in (False, True):
        seen.clear()
        with open_gguf(path) as file:
            if stopping:
                with pytest.raises(InvalidParameter, match="closed"):
                    _ = file.sha256
                assert seen == [64]
            else:
                assert file.sha256 == whole
                assert sum(seen) == file.size == path.stat().st_size
