"""The corpus remembers, tokenizers and files are what they say, and a derived file is a checked one."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import gguf
import numpy as np
import pytest

import prill_fixtures
from prill_fixtures import NAMES, TYPES, FixtureError, export, make, store, vocab
from prill_fixtures.config import CONFIGS, SPECIAL, TINY, Config, is_matrix, shapes
from prill_fixtures.corpus import Chronicle, document, documents
from prill_fixtures.derive import FILE_TYPES, derive
from prill_runtime.run.model import Model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:sentencepiece")


def random_weights(name: str, folder: Path, config: Config | None = None) -> Path:
    """An archive as the training writes it, with random weights."""
    rng = np.random.default_rng(5)
    arrays = {
        key: rng.standard_normal(shape).astype(np.float16 if is_matrix(key) else np.float32)
        for key, shape in shapes(CONFIGS[name]).items()
    }
    file = folder / f"{name}.npz"
    np.savez(file, config=json.dumps(asdict(config or CONFIGS[name])), **arrays)  # type: ignore[arg-type]
    return file


# the corpus


def test_the_corpus_is_decided_by_its_seed() -> None:
    """The same seed gives the same text on any machine (a recorded digest), another seed other text."""
    text = "".join(itertools.islice(documents(3), 500))
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "fd8c0ab264812d72bb9cfab7b8db9f79da3207a0b52ddd2ad6eb516f098439f4"
    )
    assert document(3, 4) == next(itertools.islice(documents(3), 4, None))
    assert document(3, 4) != document(4, 4)


@pytest.mark.parametrize("name", TINY)
def test_early_facts_return_after_256_tokens(name: str) -> None:
    """Secret words, which no grammar predicts, stand in the first 256 tokens and again after them."""
    import random

    encode, decode, _, _ = vocab.encoder(name)
    recalled = known = 0
    for index in range(50):
        chronicle = Chronicle(random.Random(f"8/{index}"))
        ids = encode(chronicle.write())
        assert 500 <= len(ids) <= 1300
        early, late = decode(ids[:256]), decode(ids[256:])
        words = [p.word for p in chronicle.people if p.word in early]
        known += len(words)
        recalled += sum(word in late for word in words)
    assert known >= 100
    assert recalled == known


def test_the_corpus_has_characters_of_every_utf8_length() -> None:
    """Byte-level tokenizers and byte fallback meet one to four bytes to a character."""
    text = "".join(itertools.islice(documents(1), 400))
    assert {len(c.encode()) for c in text} == {1, 2, 3, 4}


# tokenizers and prompts


@pytest.mark.parametrize("name", [*TINY, "gpt-oss-tiny"])
def test_tokenizers_cover_the_corpus(name: str) -> None:
    """All 1024 ids are in range, held-out text comes back, and it takes far fewer tokens than bytes."""
    encode, decode, opening, closing = vocab.encoder(name)
    text = document(9, 0) + "Zażółć 日本 🌙"
    ids = encode(text)
    assert decode(ids) == text
    assert max([*ids, *opening, *closing]) < vocab.SIZE
    assert len(ids) < len(text.encode()) / 2


@pytest.mark.parametrize("name", TINY)
def test_prompts_are_eight_unseen_openings(name: str) -> None:
    """Eight different prompts of 40 to 180 tokens, one beyond Latin, which leave room for 300 tokens."""
    prompts = prill_fixtures.prompts(name)
    assert prompts == export.opening_prompts(1000 * NAMES.index(name))
    assert len(set(prompts)) == 8
    encode = vocab.encoder(name)[0]
    assert all(40 <= len(encode(prompt)) <= 180 for prompt in prompts)
    assert any(ord(c) > 0x2000 for c in prompts[-1])


def test_prompts_of_special_models_are_few_and_one_fills_the_context() -> None:
    """Unseen openings; the second of `llama-long` and the 300 tokens of its golden are all its context."""
    for name in SPECIAL:
        prompts = [text.removeprefix(vocab.TURN) for text in prill_fixtures.prompts(name)]
        assert prompts[::2] == export.opening_prompts(1000 * NAMES.index(name))[:3:2]
        assert len(set(prompts)) == 3
    encode, _, opening, _ = vocab.encoder("llama-long")
    ids = [*opening, *encode(prill_fixtures.prompts("llama-long")[1])]
    assert len(ids) + export.TOKENS == CONFIGS["llama-long"].context == 2048


# export


@pytest.mark.parametrize("name", TINY)
def test_export_writes_what_a_converter_writes(name: str, tmp_path: Path) -> None:
    """The file holds the weights unchanged, matrices F16 and vectors F32, and the configuration's keys."""
    weights, file = random_weights(name, tmp_path), tmp_path / f"{name}.gguf"
    export.write_gguf(name, weights, file)
    assert file.stat().st_size <= export.LARGEST
    reader, config = gguf.GGUFReader(file), CONFIGS[name]
    archive = np.load(weights)
    assert {t.name for t in reader.tensors} == set(shapes(config)) == set(archive.files) - {"config"}
    for tensor in reader.tensors:
        assert tensor.tensor_type.name == ("F16" if tensor.data.ndim > 1 else "F32")
        np.testing.assert_array_equal(tensor.data, archive[tensor.name])

    def value(key: str) -> object:
        return reader.fields[key].contents()

    arch = config.architecture
    assert value("general.architecture") == arch
    assert value(f"{arch}.context_length") == 1024
    assert value(f"{arch}.attention.head_count") == 4
    tokens, types = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    assert len(tokens) == len(set(tokens)) == len(types) == 1024
    if arch == "llama":
        assert value("llama.attention.head_count_kv") == 2
        assert value("llama.rope.freq_base") == 50000.0
        assert value("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
        assert tokens[:3] == ["<unk>", "<s>", "</s>"]
        assert types[:3] == [2, 3, 3]
        assert tokens[3:259] == [f"<0x{i:02X}>" for i in range(256)]
        assert set(types[3:259]) == {6}
        assert value("tokenizer.ggml.bos_token_id") == 1
    else:
        assert "output.weight" not in {t.name for t in reader.tensors}
        assert value("gpt2.attention.layer_norm_epsilon") == pytest.approx(1e-5)
        merges = value("tokenizer.ggml.merges")
        assert isinstance(merges, list)
        assert len(merges) == 1024 - 256 - 1
        assert all("".join(merge.split(" ")) in tokens for merge in merges)
        assert tokens[-1] == "<|endoftext|>"
        assert value("tokenizer.ggml.eos_token_id") == 1023


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    """An archive trained for another rope base is not exported under today's configuration."""
    other = replace(CONFIGS["llama-tiny"], rope_base=10000.0)
    with pytest.raises(FixtureError, match="train again"):
        export.write_gguf("llama-tiny", random_weights("llama-tiny", tmp_path, other), tmp_path / "x.gguf")


@pytest.mark.parametrize("name", SPECIAL)
def test_special_files_are_small(name: str) -> None:
    """They hold the tensors of their configuration, in less than a megabyte."""
    reader = gguf.GGUFReader(prill_fixtures.path(name))
    assert {t.name: tuple(t.shape[::-1].tolist()) for t in reader.tensors} == shapes(CONFIGS[name])
    assert prill_fixtures.path(name).stat().st_size < 1_000_000


def test_an_export_adds_to_the_record(tmp_path: Path) -> None:
    """Of a folder with one model that one alone is written; how the others were trained stays on record."""
    (tmp_path / "train.json").write_text('{"gpt2-tiny": {"steps": 3}}')
    with pytest.raises(FixtureError, match="train first"):
        export.export(tmp_path, tmp_path)
    random_weights("llama-long", tmp_path)
    (tmp_path / "llama-long.json").write_text('{"steps": 5}')
    export.export(tmp_path, tmp_path)
    assert [file.name for file in tmp_path.glob("*.gguf")] == ["llama-long.gguf"]
    record = json.loads((tmp_path / "train.json").read_text())
    assert record == {"gpt2-tiny": {"steps": 3}, "llama-long": {"steps": 5}}


def test_a_special_file_says_what_a_tiny_one_leaves_out() -> None:
    """`llama-window` has each thing that a file may say, its window is shorter than its prompts, and its
    stream is no larger than its eps; `llama-long` has a long context without a window."""
    fields, config = gguf.GGUFReader(prill_fixtures.path("llama-window")).fields, CONFIGS["llama-window"]
    said = {key.removeprefix("llama."): fields[key].contents() for key in fields if key.startswith("llama.")}
    assert said["attention.sliding_window"] == config.window == 12
    assert said["attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert (said["rope.scaling.type"], said["rope.scaling.factor"]) == ("linear", 4.0)
    assert (said["context_length"], said["rope.scaling.original_context_length"]) == (2048, 512)
    tensors = {t.name: t.data for t in gguf.GGUFReader(prill_fixtures.path("llama-window")).tensors}
    assert {n for n in tensors if n.endswith(".bias")} == {
        f"blk.{layer}.attn_{part}.bias" for layer in range(2) for part in ("q", "k", "v", "output")
    }
    assert len(set(tensors["rope_freqs.weight"].tolist())) == config.head_dim // 2
    small = float(np.mean(tensors["token_embd.weight"].astype(np.float64) ** 2))
    assert 0.1 * config.epsilon < small < 2 * config.epsilon
    encode = vocab.encoder("llama-window")[0]
    assert all(len(encode(prompt)) > 3 * config.window for prompt in prill_fixtures.prompts("llama-window"))
    long = gguf.GGUFReader(prill_fixtures.path("llama-long")).fields
    assert long["llama.context_length"].contents() == 2048
    assert "llama.attention.sliding_window" not in long


# derived types


@pytest.mark.parametrize("type", FILE_TYPES)
def test_deriving_changes_matrices_only(type: str, tmp_path: Path) -> None:
    """Metadata and vectors are those of the source, matrices have the type and decode near the source."""
    source, file = prill_fixtures.path("gpt2-tiny"), tmp_path / "derived.gguf"
    file.write_bytes(derive(source, type))
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(file)
    assert list(before.fields) == list(after.fields)
    changed = {k for k in before.fields if before.fields[k].contents() != after.fields[k].contents()}
    assert changed == {"general.file_type"}
    assert after.fields["general.file_type"].contents() == FILE_TYPES[type][1]
    assert len(before.tensors) == len(after.tensors) > 40
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert (old.name, list(old.shape)) == (new.name, list(new.shape))
        assert new.tensor_type == (
            FILE_TYPES[type][0] if old.data.ndim > 1 else gguf.GGMLQuantizationType.F32
        )
        decoded = gguf.quants.dequantize(new.data, new.tensor_type).reshape(old.data.shape)
        error = np.abs(decoded - old.data.astype(np.float32)).max()
        assert error <= {"f32": 0.0, "bf16": 2**-8}.get(type, 0.2) * np.abs(old.data.astype(np.float32)).max()


@pytest.mark.parametrize(("name", "type"), [(name, type) for name in NAMES for type in store.types(name)])
def test_every_fixture_has_its_recorded_digest(
    name: str, type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`path` gives a file whose sha256 is the recorded one, derived anew in an empty cache, then reused."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path))
    file = prill_fixtures.path(name, type)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == prill_fixtures.sha256(name, type)
    stamp = file.stat().st_mtime_ns
    assert prill_fixtures.path(name, type) == file
    assert file.stat().st_mtime_ns == stamp
    assert file.is_relative_to(tmp_path) == (type != store.types(name)[0])


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_cache_is_repaired(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A derived file that is not what was recorded is replaced, never handed out."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path))
    file = prill_fixtures.path("llama-tiny", "q4_0")
    good = file.read_bytes()
    flipped = good[:-9] + bytes([good[-9] ^ 1]) + good[-8:]
    file.write_bytes({"flip": flipped, "truncate": good[:1000], "empty": b""}[damage])
    assert prill_fixtures.path("llama-tiny", "q4_0").read_bytes() == good


def test_processes_that_derive_at_once_agree(tmp_path: Path) -> None:
    """Four processes ask for one file in an empty cache: all get the same good file, nothing else is left."""
    script = "import prill_fixtures as f; print(f.path('llama-tiny', 'q8_0'))"
    env = {"PRILL_CACHE": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))}
    running = [
        subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    printed = {process.communicate(timeout=60)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0] * 4
    (answer,) = printed
    assert store.digest(Path(answer).read_bytes()) == prill_fixtures.sha256("llama-tiny", "q8_0")
    assert [f.name for f in Path(answer).parent.iterdir() if not f.name.endswith(".lock")] == [
        Path(answer).name
    ]


def test_quantisers_that_changed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that derives to another digest is an error with both digests, and nothing is kept."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path))
    real = derive
    monkeypatch.setattr("prill_fixtures.derive.derive", lambda source, type: real(source, type) + b"\0")
    with pytest.raises(
        FixtureError, match=r"llama-tiny derived as q4_0: sha256 expected \w+, got \w+; .*digests"
    ):
        prill_fixtures.path("llama-tiny", "q4_0")
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_changed_committed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One flipped bit in the F16 file is an error that says what to do."""
    content = bytearray(prill_fixtures.path("llama-tiny").read_bytes())
    content[-100] ^= 1
    (tmp_path / "llama-tiny.gguf").write_bytes(content)
    (tmp_path / "digests.json").write_bytes((store.MODELS / "digests.json").read_bytes())
    monkeypatch.setattr(store, "MODELS", tmp_path)
    with pytest.raises(FixtureError, match="restore the committed file"):
        prill_fixtures.path("llama-tiny")


def test_a_cache_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file where the cache folder should be gives an error that names PRILL_CACHE."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(FixtureError, match="point PRILL_CACHE") as caught:
        prill_fixtures.path("llama-tiny", "q4_0")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "type"), [("llama", "f16"), ("llama-tiny", "q5_k"), ("llama-long", "q4_k"), ("../x", "f16")]
)
def test_unknown_fixtures_are_refused(name: str, type: str) -> None:
    """The message lists what there is."""
    for ask in (prill_fixtures.path, prill_fixtures.golden_path, prill_fixtures.sha256):
        with pytest.raises(FixtureError, match="expected one of"):
            ask(name, type)


def test_f32_shares_the_golden_of_f16() -> None:
    """Both have the same weights; the other types have their own golden."""
    files = [prill_fixtures.golden_path("llama-tiny", type).name for type in TYPES]
    assert files[0] == files[1] == "llama-tiny.f16.json"
    assert len(set(files)) == len(TYPES) - 1


# what was trained


def held_out(name: str) -> dict[str, float]:
    """By the record of the training, the mean loss of unseen text, by position."""
    record = json.loads((store.MODELS / "train.json").read_text(encoding="utf-8"))[name]
    loss: dict[str, float] = record["held_out_loss"]
    return loss


@pytest.mark.parametrize("name", TINY)
def test_the_committed_models_learned_to_remember(name: str) -> None:
    """Text is predicted well, and the late part, which recalls, best."""
    loss = held_out(name)
    assert loss["all"] < 1.0
    assert loss["257+"] < loss["65-256"] / 2


@pytest.mark.parametrize("name", SPECIAL)
def test_the_special_models_were_trained_too(name: str) -> None:
    """Text is predicted well to the end of the context; chance would be a loss of 6.9."""
    loss = held_out(name)
    assert loss["all"] < 1.0
    assert list(loss.values())[-2] < loss["65-256"]


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_file_predicts_text(name: str) -> None:
    """The file itself, by the runtime, on 300 ids of a document that no training saw."""
    encode, _, opening, _ = vocab.encoder(name)
    ids = [*opening, *encode(document(5, 1))][:300]
    with Model.load(prill_fixtures.path(name), dtype="float64") as model:
        (rows,) = model.forward([(model.new_cache(), ids)])
    rows = rows[:-1] - np.log(np.exp(rows[:-1]).sum(1, keepdims=True))
    assert -rows[np.arange(len(rows)), ids[1:]].mean() < 1.0


@pytest.mark.hf
@pytest.mark.parametrize("name", NAMES)
def test_the_exported_file_means_what_was_trained(name: str, tmp_path: Path) -> None:
    """The training's forward pass and the runtime on the exported file agree over 300 positions."""
    torch = pytest.importorskip("torch")
    from prill_fixtures import nets

    initial = nets.written(CONFIGS[name], nets.initial(CONFIGS[name], 3))
    arrays = {k: (v.half() if is_matrix(k) else v).numpy() for k, v in initial.items()}
    np.savez(tmp_path / "w.npz", config=json.dumps(asdict(CONFIGS[name])), **arrays)
    export.write_gguf(name, tmp_path / "w.npz", tmp_path / "w.gguf")
    file = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type))
            for t in gguf.GGUFReader(tmp_path / "w.gguf").tensors}  # fmt: skip
    for key, array in arrays.items():  # which of experts was rounded in training
        coarse = bool(CONFIGS[name].experts) and is_matrix(key) and not key.endswith("_exps.weight")
        lost = np.abs(file[key].numpy() - array.astype(np.float32)).max()
        assert lost <= coarse * np.abs(array).max() / 200
    ids = np.random.default_rng(2).integers(0, 1024, 300).tolist()
    with torch.no_grad():
        logits = nets.forward(CONFIGS[name], file, torch.tensor([ids]))
    expected = torch.log_softmax(logits[0].double(), -1).numpy()
    with Model.load(tmp_path / "w.gguf", dtype="float64") as model:
        (got,) = model.forward([(model.new_cache(), ids)])
    got = got - np.log(np.exp(got).sum(1, keepdims=True))
    assert got.shape == expected.shape == (300, 1024)
    assert np.abs(got - expected).max() < 1e-3


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` of the maker names every command and shows how they follow one another."""
    with pytest.raises(SystemExit) as stopped:
        make.main(["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    for command in (
        "tokenizers",
        "train",
        "export",
        "derive-digests",
        "all",
        "prill_fixtures.make train --only",
    ):
        assert command in out
