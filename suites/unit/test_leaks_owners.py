"""Whose an allocation and a death are: the engine's, a library's, or nobody's who only works for a caller."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prill_harness.leaks.judge.probe import Conversation
from prill_harness.leaks.ledgers import build, lastwords
from prill_harness.leaks.ledgers.owners import Code, Owner, mapped, owner
from prill_harness.leaks.probed import protocol
from prill_harness.leaks.reports.report import LeakVerdict, Probe

from .preloaded import preloaded

TYPES = ("f16", "f32", "bf16", "q8_0", "q4_0", "q4_k", "q6_k")

WALK = """
import sys
from prill_harness.engines.models import resolve_model
from prill_harness.leaks.probed import paths, walk
from prill_harness.leaks.ledgers.native import Interposer
model = str(resolve_model(sys.argv[1]))
judged, walked = walk.walk_over(lambda: paths.opened("numpy", model).close(), Interposer(), 4096, 0.5)
print(judged.verdict.value, walked.failed, walked.spared, judged.sentence)
"""


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
def test_every_fixture_survives_its_failed_allocations(name: str, kind: str) -> None:
    """On every model and type: allocations of the load are failed, nothing dies, nothing remains.

    Of NumPy and of the tokenizer there were some to spare.
    """
    verdict, failed, spared, sentence = preloaded(WALK, f"fixture:{name}:{kind}").split(maxsplit=3)
    assert verdict == "clean", sentence
    assert int(failed) > 0
    assert int(spared) > 0


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (np.linalg._umath_linalg.__file__, Owner.LIBRARY),  # type: ignore[attr-defined]
        ("/x/lib/python3.12/site-packages/tokenizers/tokenizers.abi3.so", Owner.LIBRARY),
        ("/usr/lib/python3/dist-packages/some.so", Owner.LIBRARY),
        ("/usr/lib/x86_64-linux-gnu/libcrypto.so.3", Owner.LIBRARY),
        ("/opt/driver/libcuda.so.1", Owner.LIBRARY),
        ("/opt/driver/libnvidia-ptxjitcompiler.so", Owner.LIBRARY),
        ("/usr/lib/x86_64-linux-gnu/libc.so.6", Owner.NOBODY),
        ("/usr/lib/x86_64-linux-gnu/libstdc++.so.6", Owner.NOBODY),
        ("/x/lib/libpython3.12.so.1.0", Owner.NOBODY),
        (str(Path(sys.executable).resolve()), Owner.NOBODY),
        ("/x/leaks/interposer-0123.so", Owner.NOBODY),
        ("/usr/lib/x86_64-linux-gnu/libffi.so.8", Owner.ENGINE),
        ("/home/me/.cache/prill/kernels/matmul.so", Owner.ENGINE),
        ("/opt/engine/libengine.so", Owner.ENGINE),
        ("/usr/local/lib/libllama.so", Owner.ENGINE),
    ],
)
def test_code_has_an_owner(path: str, expected: Owner) -> None:
    """Packages, the system and drivers are libraries; libc and the interpreter nobody; all else engine."""
    assert owner(Path(path)) is expected


def test_a_package_installed_elsewhere_is_a_library(tmp_path: Path) -> None:
    """`pip install --target FOLDER` makes a folder of packages of any name; sources stay the engine's."""
    (tmp_path / "packages" / "mine-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "sources").mkdir()
    asked = (
        "import sys; from pathlib import Path; from prill_harness.leaks.ledgers.owners import owner\n"
        "print(*(owner(Path(each) / 'mine' / 'a.abi3.so').name for each in sys.argv[1:]))"
    )
    folders = [str(tmp_path / name) for name in ("packages", "sources")]
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH", "")])])
    done = subprocess.run(
        [sys.executable, "-c", asked, *folders],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["LIBRARY", "ENGINE"]


def test_only_code_of_files_is_told() -> None:
    """Of the lines of a process's maps: executable parts of files that are somebody's, with their ends."""
    lines = [
        "1000-2000 r-xp 00000000 08:01 7    /opt/engine/libengine.so\n",
        "2000-3000 rw-p 00000000 08:01 7    /opt/engine/libengine.so\n",
        "3000-4000 r-xp 00000000 00:00 0    [vdso]\n",
        "4000-5000 r-xp 00000000 00:00 0\n",
        "5000-6000 r-xp 00000000 08:01 7    /usr/lib/libc.so.6\n",
        "6000-7000 r-xp 00000000 08:01 7    /usr/lib/lib with space.so.6\n",
    ]
    expected = {Code(0x1000, 0x2000, Owner.ENGINE), Code(0x6000, 0x7000, Owner.LIBRARY)}
    assert mapped(lines) == expected


ENGINE = """
#include <stdlib.h>
#include <string.h>
int library_fill(char *block);
int engine_open(int itself) {
    char *block = malloc(9000);
    if (itself) { memset(block, 1, 9000); }
    else library_fill(block);
    free(block);
    return 0;
}
"""
LIBRARY = """
#include <string.h>
int library_fill(char *block) { memset(block, 1, 9000); return 0; }
"""
DIES = """
import ctypes, faulthandler, sys
from prill_harness.leaks.probed import walk
from prill_harness.leaks.ledgers.native import Interposer
faulthandler.enable()
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
engine = ctypes.CDLL(sys.argv[2])
def load(): engine.engine_open(int(sys.argv[3]))
tell = lambda message: print("allocation", message.nth, "of", message.of, file=sys.stderr)
walk.walk_over(load, Interposer(), 8192, tell=tell)
"""


def built(source: str, library: Path, *links: str) -> str:
    library.parent.mkdir(exist_ok=True)
    words = ["gcc", "-O1", "-fno-builtin", "-shared", "-fPIC", "-xc", "-", *links, "-o", str(library)]
    subprocess.run(words, input=source, text=True, check=True)
    return str(library)


@pytest.mark.parametrize("itself", [True, False])
def test_a_death_is_told_with_its_frame(tmp_path: Path, itself: bool) -> None:
    """A real engine that uses memory it was refused dies in its own code, or in a library it hands it to.

    What the process says last names function and file, and the line of Python that called.
    """
    library = built(LIBRARY, tmp_path / "site-packages" / "third.so")
    engine = built(ENGINE, tmp_path / "engine.so")
    done = subprocess.run(
        [sys.executable, "-c", DIES, library, engine, str(int(itself))],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"LD_PRELOAD": str(build.interposer())},
        check=False,
    )
    assert done.returncode < 0, done.stderr
    said = done.stderr.splitlines()
    assert said[0].startswith("allocation ")
    end = lastwords.read(said)
    assert end is not None
    assert end.engine is itself
    who = "engine_open in engine.so+0x" if itself else "library_fill in third.so+0x"
    assert who in end.sentence
    assert "called by load (<string>:" in end.sentence


class Dead:
    """Stands for a process that measured, began to fail an allocation, and died."""

    late = False

    def __init__(self, said: Sequence[Any], printed: Sequence[str]) -> None:
        self._said, self._printed = said, list(printed)

    def messages(self) -> Sequence[Any]:
        return self._said

    def ended(self) -> int:
        return -11

    def said(self) -> list[str]:
        return self._printed


@pytest.mark.parametrize(
    ("printed", "expected", "word"),
    [
        (
            ["prill: died in library npyiter in umath.so+0x1f"],
            LeakVerdict.INCONCLUSIVE,
            "npyiter in umath.so+0x1f",
        ),
        (["prill: died in interpreter "], LeakVerdict.INCONCLUSIVE, "the interpreter"),
        (["prill: died in engine engine_open in engine.so+0x9"], LeakVerdict.BROKEN, "engine_open"),
        (["Fatal Python error: Segmentation fault"], LeakVerdict.BROKEN, "Fatal Python error"),
    ],
)
def test_only_a_death_in_the_engine_is_the_engines(
    printed: list[str], expected: LeakVerdict, word: str
) -> None:
    """In a library's or the interpreter's frame after a failed allocation: inconclusive, with the ordinal.

    Without a last word no allocation had been failed yet, so that what died was at its usual work: broken.
    """
    hosted: Any = Dead([protocol.Failing(51, 295)], printed)
    report = Conversation(Probe("numpy", "x", "load"), hosted, lambda probe, call: None).report()
    assert report.verdict is expected
    assert word in report.sentence
    if "prill" in printed[0]:
        assert (
            "allocation 51 of 295 of a load failed, and the process was ended by SIGSEGV" in report.sentence
        )
        assert report.seen[-1].verdict is expected
