"""Defects planted in real files of any shape: each is named by the same sentence."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prill_fixtures import malformed
from prill_runtime.errors import ModelFileError
from prill_runtime.gguf.file import open_gguf

from .tiny_gguf import Floats, tiny


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_defects_of_a_real_file_are_named_whatever_its_sizes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A tied table that is most of the file, a vocabulary that is, many small layers: the same sentences."""
    arch = data.draw(st.sampled_from(["llama", "gpt2"]))
    vocab_size = data.draw(st.sampled_from([300, 2_000, 20_000]))
    sizes = {"n_layers": data.draw(st.integers(1, 3)), "width": data.draw(st.sampled_from([12, 48]))}
    if arch == "llama":
        sizes |= {"n_heads": 2, "n_kv_heads": 1}
    tied = data.draw(st.booleans()) and arch == "llama"
    folder = tmp_path_factory.mktemp("real")
    path = tiny(folder / "real.gguf", arch, vocab_size=vocab_size, edit=_tied if tied else None, **sizes)
    bad, found = folder / "bad.gguf", 0
    for defect in malformed.corpus(path.read_bytes()):
        if defect.name.startswith("real file"):
            bad.write_bytes(defect.data)
            with pytest.raises(ModelFileError, match=re.escape(defect.expects)):
                open_gguf(bad)
            found += 1
    assert found >= 9


def _tied(tensors: dict[str, Floats]) -> None:
    del tensors["output.weight"]
