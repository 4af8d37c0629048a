"""A real browser without a window: what a page looks like at a width, and what it says to the console.

The page stands in a frame of the asked size, for a browser's own window has a least width.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files",
    "--enable-logging=stderr", "--virtual-time-budget=20000", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions",
)  # fmt: skip
FRAME = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="frame" src="{page}" style="border:0;width:{width}px;height:{height}px"></iframe>
<pre id="told"></pre>
<script>
const frame = document.getElementById("frame");
frame.addEventListener("load", async () => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  const told = await (async () => {{ {script} }})();
  document.getElementById("told").textContent = JSON.stringify(told);
}});
</script>"""


def browser() -> str:
    """The command of an installed browser; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no browser: install chromium")
    return found


def looked_at(page: Path, width: int, height: int, script: str, folder: Path) -> tuple[Any, list[str]]:
    """What a script returns that sees the loaded `page` and its `view`, and the lines of the console."""
    frame = folder / f"frame{width}.html"
    frame.write_text(FRAME.format(page=page.as_uri(), width=width, height=height, script=script))
    done = _run(f"--window-size={max(width, 500)},{height}", f"--user-data-dir={folder / 'browser'}",
                "--dump-dom", frame.as_uri())  # fmt: skip
    told = done.stdout.partition('<pre id="told">')[2].partition("</pre>")[0]
    assert told, done.stderr[-2000:]
    for name, sign in (("lt", "<"), ("gt", ">"), ("amp", "&")):
        told = told.replace(f"&{name};", sign)
    return json.loads(told), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def printed(page: Path, folder: Path) -> bytes:
    """The page as a PDF, as a reader would print it."""
    target = folder / "printed.pdf"
    _run("--no-pdf-header-footer", f"--user-data-dir={folder / 'browser'}", f"--print-to-pdf={target}",
         page.as_uri())  # fmt: skip
    return target.read_bytes()


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [browser(), *FLAGS, *words], capture_output=True, text=True, timeout=120, check=False
    )
