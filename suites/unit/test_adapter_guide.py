"""The guide to adding a model, followed literally: files written, commands run, their output compared."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prill_harness.stages.table import canonical
from prill_runtime import user_cache
from prill_runtime.gguf.file import open_gguf
from prill_runtime.models import registry, walks
from prill_runtime.models.load import describe

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "ADAPTER_PATTERN_GUIDE.md").read_text("utf-8")
FENCE = re.compile(r"^```(\S*)(?: ([^\n]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SESSION = "pycon"  # what is said to an interpreter: no step of a reader's
EXIT = re.compile(r"\s+# exit (\d+)$")
ANYTHING = "…"
INCONCLUSIVE = 10
# What a progress bar is where nobody looks at it: lines with a count and a time.
PROGRESS = re.compile(r"^(?:\[ *\d+/\d+\].*|recording the golden of .*)\n", re.MULTILINE)
TIME = re.compile(r"\b\d+(?:\.\d+)? s\b")


@dataclass(frozen=True)
class Step:
    """A file that is written, or lengthened; or a command, what it prints and its exit code."""

    text: str
    file: str = ""
    added: bool = False
    shown: str = ""
    exit_code: int = 0


def steps(guide: str) -> Iterator[Step]:
    """Everything that a reader does, in order.

    Raises:
        AssertionError: a block that is neither a file nor a console.
    """
    for kind, file, body in FENCE.findall(guide):
        if kind == SESSION:
            continue
        if kind == "console":
            for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
                first, _, shown = part.partition("\n")
                code = EXIT.search(first)
                yield Step(EXIT.sub("", first), shown=shown, exit_code=int(code[1]) if code else 0)
        else:
            assert kind in ("python", "toml"), f"a block of kind {kind!r}"
            assert file, f"a block of {kind} without a file's name"
            yield Step(body, file.removeprefix(">> "), file.startswith(">> "))


def expected(shown: str) -> re.Pattern[str]:
    """What is shown as an expression: `…` alone is any lines, inside a line any text; all else is literal."""
    lines = [
        r"(?:.*\n)*" if line.strip() == ANYTHING
        else ".*".join(map(re.escape, TIME.sub("0 s", line).rstrip().split(ANYTHING))) + r" *\n"
        for line in shown.splitlines()
    ]  # fmt: skip
    return re.compile("".join(lines))


def printed(text: str) -> str:
    """What a command printed, without progress and times."""
    return TIME.sub("0 s", PROGRESS.sub("", text))


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """The environment of a reader who has just installed prill; that of the tests stays as it is.

    Compiled kernels are those of the tests' own cache; goldens are not.
    """
    home = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "prill.pth").write_text(
        f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n", "utf-8"
    )
    for name, call in (
        ("prill", "from prill_harness.cli import main"), ("pip", "from pip._internal.cli.main import main"),
    ):  # fmt: skip
        script = home / "bin" / name
        script.write_text(f"#!{home}/bin/python\nimport sys\n{call}\nsys.exit(main())\n", "utf-8")
        script.chmod(0o755)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "kernels").symlink_to(user_cache.folder("kernels"))
    return {
        **os.environ, "PATH": f"{home}/bin:{os.environ['PATH']}", "PRILL_CACHE": str(cache),
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8",
        "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }  # fmt: skip


def follow(guide: str, folder: Path, shell: dict[str, str]) -> None:
    """Write every file and run every command, in order, and hold each to what is shown of it."""
    for step in steps(guide):
        if step.file:
            with (folder / step.file).open("a" if step.added else "w", encoding="utf-8") as file:
                file.write(step.text)
            continue
        done = subprocess.run(
            ["bash", "-c", step.text], cwd=folder, env=shell, capture_output=True, text=True, timeout=300,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        said = printed(done.stdout + done.stderr)
        code = done.returncode
        if step.text.startswith("prill gate") and code == INCONCLUSIVE:
            code, said = but_for_kills(folder / "out" / "verdict.json", code, said)
        assert code == step.exit_code, f"$ {step.text}\n{said}"
        assert expected(step.shown).fullmatch(said), f"$ {step.text}\nshown:\n{step.shown}\nprinted:\n{said}"


def but_for_kills(path: Path, code: int, said: str) -> tuple[int, str]:
    """Exit code and output of a gate, were all its checks seen to kill as they are now."""
    verdict = json.loads(path.read_text("utf-8"))
    if {rule["id"] for rule in verdict["rules"] if rule["status"] != "passed"} != {"kills"}:
        return code, said
    counts, items = verdict["counts"], [item["status"] == "proven" for item in verdict["items"]]
    told = f"{counts['checks']} checks in {counts['cells']} cells, {sum(items)} of {len(items)} items proven"
    said = re.sub(r"^rule kills inconclusive: .*\n", "", said, flags=re.MULTILINE)
    return 0, re.sub(r"^(gate \w+) is inconclusive: .*", rf"\1 passed: {told}", said, flags=re.MULTILINE)


def test_the_guide_does_what_it_shows(shell: dict[str, str], tmp_path: Path) -> None:
    """Every file and command, in order: the exit code, and all that is printed but times and progress."""
    folder = tmp_path / "magpie"
    folder.mkdir()
    follow(GUIDE, folder, shell)


def test_the_extraction_is_not_vacuous() -> None:
    """There are as many files and commands as the guide promises, with each outcome that it speaks of."""
    found = list(steps(GUIDE))
    files = [step.file for step in found if step.file]
    assert files == ["make.py", "prill_magpie.py", "pyproject.toml", "magpie_second.py", "pyproject.toml"]
    commands = [step for step in found if not step.file]
    assert len(commands) == GUIDE.count("\n$ ") >= 30
    assert {step.exit_code for step in commands} == {0, 1, 4, 10}
    for words in ("inspect", "trace", "bisect", "run --model magpie.gguf properties", "fault:"):
        assert any(words in step.text for step in commands), words
    assert {"numpy", "emu", "emu:fast"} <= {w for step in commands for w in step.text.split()}


def test_what_is_not_printed_is_missed() -> None:
    """Other words, other figures, a line less or more: only `…` and times are free."""
    assert expected("a … c\n…\nin 3.1 s\n").fullmatch(printed("a b c\nx\ny\n[1/2] 3 s\nin 70 s\n"))
    for shown in ("a b\n", "a b c\nd\n", "a b\nc\n", "1.5\n", "a … d\n"):
        assert not expected(shown).fullmatch(printed("a b c\n")), shown


def test_its_description_and_its_second_reading_are_short() -> None:
    """At most 40 lines, and 25 for the arithmetic of the second, which imports nothing of the runtime."""
    files = {step.file: step.text for step in steps(GUIDE) if step.file.endswith(".py")}
    assert len(files["prill_magpie.py"].splitlines()) <= 40
    second = files["magpie_second.py"]
    forward = second[second.index("    def norm") : second.index("    return s\n")]
    assert len([line for line in forward.splitlines() if line.strip()]) <= 25
    assert "prill_runtime" not in second
    assert all(len(line) <= 110 for text in files.values() for line in text.splitlines())


def test_its_tables_are_the_models(tmp_path: Path) -> None:
    """The stages of its table are all of them, in their order; its features are those of the tree."""
    files = {step.file: step.text for step in steps(GUIDE)}
    subprocess.run([sys.executable, "-c", files["make.py"]], cwd=tmp_path, check=True)
    described: dict[str, Any] = {}
    exec(files["prill_magpie.py"], described)
    registry.declare("magpie", described["model"])
    try:
        with open_gguf(tmp_path / "magpie.gguf") as file:
            network = describe(file)
    finally:
        del registry._declared["magpie"]
    rows = dict.fromkeys(re.findall(r"^\|[^|]*\| `(\S+)` \| `\S+` \|$", GUIDE, re.MULTILINE))
    inner = [row.replace(".N.", f".{n}.") for n in range(2) for row in rows if ".N." in row]
    first, *last = [row for row in rows if ".N." not in row]
    assert list(walks.stages(network)) == [first, *inner, *last]
    (said,) = re.findall(r"magpie has ((?:`\w+`(?:, |\s+and\s+|,\n)?)+)", GUIDE)
    assert set(re.findall(r"\w+", said)) - {"and"} == walks.features(network)


def test_its_table_of_names_is_the_stage_tables() -> None:
    """Each of llama.cpp's names is understood as the stage beside it; rotated ones and all."""
    rows = re.findall(r"^\| (?:`\S+`)? *\| `(\S+)` \| `(\S+)` \|$", GUIDE, re.MULTILINE)
    assert len(rows) == 17
    for stage, name in rows:
        assert canonical(name.replace("-N", "-3")) == stage.replace(".N.", ".3."), name
