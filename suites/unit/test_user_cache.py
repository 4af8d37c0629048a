"""The user's cache: what lies there is loaded and judges, so it is whole, the user's own, or made anew."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from prill_harness.leaks.judge.hosted import lost_settings
from prill_harness.leaks.judge.probe import run
from prill_harness.leaks.ledgers import build
from prill_harness.leaks.reports.report import LeakVerdict, Probe
from prill_harness.tokens.golden import golden_for
from prill_runtime import user_cache
from prill_runtime.device.machine import compile as kernels
from prill_runtime.errors import UsageError

from .commandline import child
from .tiny_gguf import tiny

Make = Callable[[Path], None]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, under a name that has a blank and a colon."""
    monkeypatch.setenv(user_cache.CACHE_VARIABLE, str(tmp_path / "my cache: prill"))
    return tmp_path / "my cache: prill"


def written(text: str) -> Make:
    return lambda file: file.write_text(text, encoding="ascii") and None


def test_a_file_is_made_once_and_kept(cache: Path) -> None:
    """The second time nothing is made; the folder is the user's alone, and nothing else is left there."""
    file = user_cache.folder("things") / "one"
    user_cache.kept(file, written("first"))
    assert user_cache.kept(file, written("second")).read_text() == "first"
    assert stat.S_IMODE((cache / "things").stat().st_mode) == 0o700
    assert {path.name for path in file.parent.iterdir()} == {"one", "one.sha256", "one.lock"}


@pytest.mark.parametrize("harm", ["cut", "changed", "empty", "digest lost", "digest empty"])
def test_what_is_broken_is_made_anew(cache: Path, harm: str) -> None:
    """A file that lost its end, another that was edited, one without its digest: none is believed."""
    file = user_cache.kept(user_cache.folder("things") / "one", written("whole"))
    mark = file.with_name("one.sha256")
    {
        "cut": lambda: file.write_text("wh"),
        "changed": lambda: file.write_text("whale"),
        "empty": lambda: file.write_text(""),
        "digest lost": mark.unlink,
        "digest empty": lambda: mark.write_text(""),
    }[harm]()
    assert not user_cache.whole(file)
    assert user_cache.kept(file, written("anew")).read_text() == "anew"
    assert user_cache.whole(file)


def test_a_maker_that_stops_leaves_nothing(cache: Path) -> None:
    """Neither half a file under its name nor a temporary one."""
    file = user_cache.folder("things") / "one"

    def stops(fresh: Path) -> None:
        fresh.write_text("half")
        raise KeyError("stopped")

    with pytest.raises(KeyError):
        user_cache.kept(file, stops)
    assert [path.name for path in file.parent.iterdir()] == ["one.lock"]


def test_two_that_want_the_same_take_turns(cache: Path) -> None:
    """Four threads at once: it is made by one of them, and all get it whole."""
    file, made, got = user_cache.folder("things") / "one", [0], list[str]()

    def make(fresh: Path) -> None:
        made[0] += 1
        fresh.write_text("x" * 100_000)

    threads = [
        threading.Thread(target=lambda: got.append(user_cache.kept(file, make).read_text())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (made, got) == ([1], ["x" * 100_000] * 4)


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o703])
def test_a_folder_that_others_may_write_is_refused(cache: Path, mode: int) -> None:
    """One sentence with the mode and what to do, for the cache folder itself and for the one inside."""
    place = user_cache.folder("things")
    place.chmod(mode)
    with pytest.raises(UsageError, match=f"others may write the cache folder.*got mode {mode:o}; chmod go-w"):
        user_cache.folder("things")
    place.chmod(0o700)
    cache.chmod(mode)
    with pytest.raises(UsageError, match="others may write the cache folder"):
        user_cache.folder("things")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to somebody else")
def test_a_folder_of_somebody_else_is_refused(cache: Path) -> None:
    """Root runs nothing out of a folder that another user owns."""
    os.chown(user_cache.folder("things"), 12345, 12345)
    with pytest.raises(UsageError, match="owned by user 12345"):
        user_cache.folder("things")


def test_a_folder_that_cannot_be_made_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file where the folder should be."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(user_cache.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(UsageError, match=r"the cache folder cannot be used.*set PRILL_CACHE"):
        user_cache.folder("things")


def cut(file: Path) -> None:
    """Leave half of a file, as a crash of the machine does."""
    os.truncate(file, file.stat().st_size // 2)


def test_a_library_that_was_cut_is_compiled_again(cache: Path) -> None:
    """Loading it would be a SIGBUS; both the emulator's kernels and the leak library are checked before."""
    for made in (lambda: kernels.build("norm", kernels.emulator_target()), build.interposer):
        library = made()
        content = library.read_bytes()
        cut(library)
        assert len(made().read_bytes()) == len(content)
        assert user_cache.whole(library)


def test_a_golden_that_was_cut_is_recorded_again(cache: Path, tmp_path: Path) -> None:
    """And never blamed on the engine."""
    model = str(tiny(tmp_path / "model.gguf", context=32))
    first = golden_for(model)
    (file,) = (path for path in (cache / "goldens").iterdir() if path.suffix == ".json")
    cut(file)
    assert golden_for(model) == first


def test_a_probe_works_where_the_path_has_blanks_and_colons(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LD_PRELOAD splits at both; the caller's own library stays preloaded, behind prill's."""
    own = shutil.copy(build.control(), tmp_path / "own.so")
    assert {" ", ":"} <= set(str(build.interposer()))
    with build.preloaded(str(own)) as (preload, files):
        said = subprocess.run(
            ["cat", "/proc/self/maps"],
            env={"LD_PRELOAD": preload},
            pass_fds=files,
            capture_output=True,
            text=True,
            check=True,
        )
    assert str(build.interposer()) in said.stdout
    assert str(own) in said.stdout
    assert said.stderr == ""
    monkeypatch.setenv("LD_PRELOAD", str(own))
    report = run(Probe("numpy", "fixture:llama-tiny", "success", 50))
    assert report.verdict is LeakVerdict.CLEAN, report.sentence


def test_settings_that_the_probed_process_does_not_get_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONMALLOC changes what is allocated, so it is left out, and the command says so."""
    monkeypatch.setenv("PYTHONMALLOC", "debug")
    assert lost_settings() == ("PYTHONMALLOC",)
    done = child("leak", "--engine", "nosuch", "--model", "fixture:llama-tiny")
    assert done.returncode == 4
    done = child("leak", "--model", "fixture:llama-tiny", "--timeout", "1")
    assert "PYTHONMALLOC is not set where the engine is probed" in done.stderr
