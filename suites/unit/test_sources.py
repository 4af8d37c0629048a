"""Which files judge for a check: all that it imports, however it is said, and nothing that comes after it."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from prill_harness import version
from prill_harness.records import parsed, sources
from prill_harness.records.catalog import suite_file, suites
from prill_harness.records.sources import judging
from prill_runtime import user_cache
from prill_runtime.errors import PrillError

RUNS = {
    "prill_harness.plugin", "prill_harness.recording.fixtures", "prill_harness.recording.recorder",
    "prill_harness.run.outcomes", "prill_harness.run.checks",
}  # fmt: skip
AFTER = ("prill_harness.commands", "prill_harness.measure.bench", "prill_harness.console", "prill_reports")
FILES = {
    "prill_harness/__init__.py": "",
    "prill_harness/run/__init__.py": "",
    "prill_harness/recording/__init__.py": "",
    "prill_harness/run/outcomes.py": "",
    "prill_harness/recording/recorder.py": "from prill_harness.run import checks\n",
    "prill_harness/run/checks.py": "",
    "prill_harness/plugin.py": "def setup():\n    from prill_harness.recording import fixtures\n",
    "prill_harness/recording/fixtures.py": (
        "import pytest\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from prill_harness import types_only\n"
        "@pytest.fixture\ndef probe(model):\n    from prill_harness.probes import run\n"
        "@pytest.fixture\ndef model():\n    from prill_harness.models import resolve\n"
        "@pytest.fixture\ndef unused():\n    from prill_harness import nobody\n"
    ),
    "prill_harness/types_only.py": "",
    "prill_harness/models.py": "",
    "prill_harness/nobody.py": "",
    "prill_harness/probes/__init__.py": "",
    "prill_harness/probes/run.py": ('WORDS = ["-m", "prill_harness.probes.child"]\nbuild("probe.c")\n'),
    "prill_harness/probes/child.py": "def main():\n    import prill_harness.lazily\n",
    "prill_harness/probes/probe.c": "int main;\n",
    "prill_harness/probes/other.py": "",
    "prill_harness/lazily.py": "import stranger\n",
    "prill_suites/__init__.py": "",
    "prill_suites/plain.py": "from prill_suites.shared import twin\ndef test_a(observe): ...\n",
    "prill_suites/probing.py": "def test_b(probe): ...\n",
    "prill_suites/shared.py": "",
    "prill_fixtures/__init__.py": "",
}
PLAIN = {
    "plain.py", "prill_harness", "prill_harness.plugin", "prill_harness.run", "prill_harness.run.checks",
    "prill_harness.run.outcomes", "prill_harness.recording", "prill_harness.recording.fixtures",
    "prill_harness.recording.recorder", "prill_suites", "prill_suites.shared",
}  # fmt: skip
TEXTS = {"plain.py", "shared.py", "recorder.py", "plugin.py", "fixtures.py"}  # of it, but for empty ones
PROBING = {
    "prill_harness.probes", "prill_harness.probes.run", "prill_harness.probes.child", "prill_harness.lazily",
    "prill_harness.models", "prill_harness/probes/probe.c",
}  # fmt: skip
HASHES = """
import hashlib
from prill_harness.records import catalog, sources
print(sources.__file__)
for name in catalog.suites():
    files = sources.judging(catalog.suite_file(name))
    print(name, {each: hashlib.sha256(text).hexdigest() for each, text in files.items()})
"""
CACHED = (sources.judging, sources._judges, sources._closure, sources._file, sources._read, parsed.kept)


def forget() -> None:
    for each in CACHED:
        each.cache_clear()


def judged_anew(suite: Path) -> dict[str, bytes]:
    """What a process that is started now would see."""
    forget()
    return dict(judging(suite))


def hashed(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(text).hexdigest() for name, text in files.items()}


@pytest.fixture
def rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Small rooms in place of prill's."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sources, "_folder", lambda room: tmp_path / room)
    monkeypatch.setenv(user_cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    forget()
    yield tmp_path / "prill_suites"
    forget()


def test_a_plain_suite_is_judged_by_what_it_imports_and_what_runs_it(rooms: Path) -> None:
    """Its own file, what stands beside it, plugin, recorder, outcomes; no fixture's modules, no types."""
    assert set(judging(rooms / "plain.py")) - {"prill_fixtures"} == PLAIN


def test_a_fixture_counts_for_the_suites_that_ask_for_it(rooms: Path) -> None:
    """With what it imports lazily, in a child process, and the file beside it that is compiled."""
    found = set(judging(rooms / "probing.py"))
    assert found - PLAIN >= PROBING
    assert not found & {"prill_harness.probes.other", "prill_harness.nobody", "prill_harness.types_only"}


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ('NAME = "prill_harness.probes.moved"', "prill_harness.probes.moved"),
        ('NAME = f"prill_harness.probes.{name}"', "prill_harness.probes."),
        ("from prill_harness.probes.moved import run", "prill_harness.probes.moved"),
        ("def late():\n    import prill_harness.moved", "prill_harness.moved"),
    ],
)
def test_a_module_that_is_not_there_is_an_error(rooms: Path, line: str, got: str) -> None:
    """What it stands for has moved or is put together at run time, and would judge without being hashed."""
    (rooms / "shared.py").write_text(line + "\n")
    with pytest.raises(PrillError, match=re.escape(f"got '{got}'")):
        judging(rooms / "plain.py")


@pytest.mark.parametrize("name", sorted(suites()))
def test_what_runs_every_check_judges_for_every_suite(name: str) -> None:
    """Recorder, plugin and outcomes are in each hash; commands, reports and planted faults in none."""
    found = judging(suite_file(name))
    assert set(found) >= RUNS
    assert not [module for module in found if module.startswith(AFTER)]
    assert not [module for module in found if module.startswith("prill_harness.faults.planted.")]


def test_leaks_judge_where_leaks_are_looked_for() -> None:
    """The leak probe is in the hash of its own suite, and in no other's."""
    probing = [n for n in suites() if "prill_harness.leaks.judge.judge" in judging(suite_file(n))]
    assert probing == ["memory"]
    assert {"prill_harness.leaks.probed.host", "prill_harness/leaks/ledgers/interposer.c"} <= set(
        judging(suite_file("memory"))
    )


@pytest.mark.parametrize(
    ("suite", "judge"),
    [
        ("tokens", "prill_harness.tokens.golden_prompts"), ("tokens", "prill_harness.tokens.divergence"),
        ("file", "prill_fixtures.malformed"), ("file", "prill_suites.file_values"),
        ("witness", "prill_harness.witness.sensitivity"), ("harness", "prill_harness.decide.gate"),
        ("harness", "prill_suites.stages"), ("ops", "prill_suites.ops_twins"),
    ],
)  # fmt: skip
def test_corpora_and_twins_are_in(suite: str, judge: str) -> None:
    """What a suite is tried on, and what it is compared with, is part of its code."""
    assert judge in judging(suite_file(suite))


def test_a_suite_of_the_users_own_is_judged_with_the_modules_beside_it(tmp_path: Path) -> None:
    """A helper that it imports counts, and a data file that it names does not: it may write it."""
    (tmp_path / "mine.py").write_text('import helper\nFILE = "runs.txt"\ndef test_a(observe): ...\n')
    (tmp_path / "helper.py").write_text("")
    (tmp_path / "runs.txt").write_text("1")
    own = [name for name in judging(tmp_path / "mine.py") if not name.startswith("prill_")]
    assert own == ["helper", "mine.py"]


def test_names_of_files_do_not_depend_on_the_machine() -> None:
    """A hash is the same wherever prill lies."""
    assert not [name for name in judging(suite_file("memory")) if name.startswith("/") or ".." in name]


def test_what_a_build_writes_judges_for_nothing(rooms: Path) -> None:
    """The stamp with the commit, which a wheel has and a checkout has not, changes no suite's code: a kill
    that was seen in a checkout is known to who installed prill."""
    harness = rooms.parent / "prill_harness"
    (harness / "run" / "checks.py").write_text("from prill_harness import version\n")
    (harness / "version.py").write_bytes(Path(version.__file__).read_bytes())
    before = dict(judging(rooms / "plain.py"))
    assert before["prill_harness.version"] == (harness / "version.py").read_bytes()
    (harness / version.STAMP).write_text("0123456789ab\n")
    assert judged_anew(rooms / "plain.py") == before


def test_what_lies_in_the_current_folder_judges_for_nothing(
    rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that a fixture imports is no part of prill, even where a file of its name lies at hand."""
    before = dict(judging(rooms / "probing.py"))
    (tmp_path / "stranger.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert judged_anew(rooms / "probing.py") == before


def test_a_wheel_is_judged_by_the_same_code_as_a_checkout(tmp_path: Path) -> None:
    """Built and unpacked, every suite has the files that it has here, byte for byte, beside a stamp."""
    pytest.importorskip("hatchling", reason="nothing to build a wheel with")
    root = Path(__file__).resolve().parents[2]
    build = "import sys, hatchling.build as b; print(b.build_wheel(sys.argv[1]))"
    words = [sys.executable, "-c", build, str(tmp_path)]
    subprocess.run(words, cwd=root, check=True, capture_output=True, timeout=120)
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    assert (site / "prill_harness" / version.STAMP).is_file()
    found = subprocess.run(
        [sys.executable, "-c", HASHES],
        cwd=site, env={**os.environ, "PYTHONPATH": str(site)}, check=True, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    where, *hashes = found.stdout.splitlines()
    assert Path(where).is_relative_to(site)
    assert hashes == [f"{name} {hashed(judging(suite_file(name)))}" for name in suites()]


@pytest.fixture
def read_anew(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose texts are parsed from here on."""
    names: list[str] = []
    parse = parsed.parse
    monkeypatch.setattr(
        parsed, "parse", lambda text, name: (names.append(Path(name).name), parse(text, name))[1]
    )
    return names


def test_a_text_is_parsed_once_and_an_edit_is_seen(rooms: Path, read_anew: list[str]) -> None:
    """The next process finds the same without parsing; of a file edited since, with the same length and the
    same time of change, it parses the new text and follows it."""
    before, shared = judged_anew(rooms / "plain.py"), rooms / "shared.py"
    assert set(read_anew) >= TEXTS
    read_anew.clear()
    assert judged_anew(rooms / "plain.py") == before
    assert read_anew == []
    for line in ("import prill_harness.types_only", "import prill_harness.lazily    "):
        shared.write_text(line)
        os.utime(shared, (1, 1))
        assert set(judged_anew(rooms / "plain.py")) - set(before) == {line.split()[1]}
    assert read_anew.count("shared.py") == 2
    assert set(read_anew) <= {"shared.py", "lazily.py"}  # what is not read anew was known


def test_whether_a_named_file_is_there_is_looked_at_anew(rooms: Path) -> None:
    """A file that is gone judges no more, and a module that is gone is an error, of a text that is known."""
    probes = rooms.parent / "prill_harness" / "probes"
    assert set(judged_anew(rooms / "probing.py")) >= PROBING
    (probes / "probe.c").unlink()
    assert "prill_harness/probes/probe.c" not in judged_anew(rooms / "probing.py")
    (probes / "child.py").unlink()
    with pytest.raises(PrillError, match="names a module that is not there"):
        judged_anew(rooms / "probing.py")


@pytest.mark.parametrize("harm", ["cut", "strange", "shared", "other reader"])
def test_what_was_kept_is_believed_only_where_it_is_whole_and_of_this_reader(
    rooms: Path, read_anew: list[str], monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """A cache that was cut, that holds something else, or that others may write is as good as none, and so is
    what another version of the reading found."""
    before = judged_anew(rooms / "plain.py")
    (kept,) = (rooms.parent / "cache" / "parsed").glob("*.json")
    if harm == "cut":
        os.truncate(kept, kept.stat().st_size // 2)
    elif harm == "strange":
        user_cache.put(kept, lambda fresh: fresh.write_text('{"a": 1}') and None)
    elif harm == "shared":
        kept.parent.chmod(0o777)
    else:
        monkeypatch.setattr(parsed, "_own_digest", lambda: "0" * 64)
    read_anew.clear()
    assert judged_anew(rooms / "plain.py") == before
    assert set(read_anew) >= TEXTS


def test_what_is_kept_does_not_grow_for_ever(rooms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past a limit only what was asked for last is kept."""
    most = len(TEXTS) + 3
    monkeypatch.setattr(parsed, "_MOST", most)
    for number in range(9):
        (rooms / "shared.py").write_text(f"NUMBER = {number}")
        judged_anew(rooms / "plain.py")
        (kept,) = (rooms.parent / "cache" / "parsed").glob("*.json")
        assert len(TEXTS) <= kept.read_bytes().count(b"outside") <= most
