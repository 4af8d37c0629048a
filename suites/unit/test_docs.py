"""Every `$ prill` line of the documentation runs, ends with the exit code shown, prints what is shown."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Their commands build on one another: test_adapter_guide.py and test_gpt_guide.py run them.
ALONE = ("ADAPTER_PATTERN_GUIDE.md", "GPT_INTEGRATION_GUIDE.md")
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name not in ALONE)]
FENCE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXIT = re.compile(r"\s+# exit (\d+)$")


@dataclass(frozen=True)
class Shown:
    """One command of a page: `$ prill ...  # exit N`, and the lines shown under it."""

    page: str
    command: str
    exit_code: int
    lines: tuple[str, ...]


def commands(page: Path) -> list[Shown]:
    """What the page's console blocks show of prill; other programs (`make`) are not run here."""
    found: list[Shown] = []
    for block in FENCE.findall(page.read_text("utf-8")):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            first, *lines = part.splitlines()
            code = EXIT.search(first)
            command = EXIT.sub("", first)
            if command.startswith("prill "):
                shown = tuple(line for line in lines if line.strip())
                found.append(Shown(page.name, command, int(code[1]) if code else 0, shown))
    return found


SHOWN = [shown for page in PAGES for shown in commands(page)]


def pattern(line: str) -> re.Pattern[str]:
    """A shown line as an expression: runs of blanks and every figure may differ, `…` stands for anything."""
    words = re.split(r"(…|\s+|\d[\d.,]*(?:e[+-]?\d+)?)", line.strip())
    parts = [
        ".*" if w == "…" else r"\s+" if w.isspace() else r"[\d.,e+-]+" if w[:1].isdigit() else re.escape(w)
        for w in words
    ]
    return re.compile("".join(parts))


def test_the_pages_show_commands() -> None:
    """The extraction is not vacuous: the README alone shows half a dozen, one of which fails on purpose."""
    readme = [shown for shown in SHOWN if shown.page == "README.md"]
    assert len(readme) >= 6
    assert any(shown.exit_code for shown in readme)
    assert any(shown.lines for shown in readme)


@pytest.mark.parametrize("shown", SHOWN, ids=lambda s: f"{s.page}:{s.command}")
def test_a_shown_command_does_what_is_shown(shown: Shown, tmp_path: Path) -> None:
    """The command ends with the promised exit code and prints every shown line, figures aside; the files that
    its page shows lie in the current folder."""
    for name, text in FILE.findall(next(p for p in PAGES if p.name == shown.page).read_text("utf-8")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    words = [str(Path(sys.executable).with_name("prill")), *shlex.split(shown.command)[1:]]
    done = subprocess.run(
        words,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == shown.exit_code, done.stdout + done.stderr
    for line in shown.lines:
        assert pattern(line).search(done.stdout + done.stderr), (
            f"not printed: {line}\n{done.stdout}{done.stderr}"
        )


def test_a_line_that_is_not_printed_is_missed() -> None:
    """Figures may differ and words may not."""
    assert pattern("NMSE 1.5e-13 of …, 8 runs").search("x NMSE 2 of 1e-11, 9 runs y")
    assert not pattern("NMSE 1.5 of …").search("NMSE x of 3")
    assert not pattern("greedy: passed").search("greedy: failed")


def test_the_readme_says_how_to_reach_prill(tmp_path: Path) -> None:
    """Its line, after `make gate`, makes `prill` a command; the environment it names is the one make fills,
    and make says the same."""
    (line,) = re.findall(r"^\$ (source \S+)", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    made = subprocess.run(["make", "-n", "gate"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f'"prill is installed: {line} makes it a command"' in made
    assert f"{line.removeprefix('source ').removesuffix('activate')}prill gate" in made
    folder = tmp_path / line.removeprefix("source ").removesuffix("/bin/activate")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (folder / "bin" / "prill").symlink_to(Path(sys.executable).with_name("prill"))
    done = subprocess.run(
        ["bash", "-c", f"{line} && command -v prill && prill --version"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    where, version = done.stdout.splitlines()
    assert where == str(folder / "bin" / "prill")
    assert version.startswith("prill ")
