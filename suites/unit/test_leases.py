"""Leases of GPUs, on made-up devices: who may have which, who waits, and what comes back from the dead."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prill_harness.plan import plan, policy
from prill_harness.plan.plan import Plan
from prill_harness.records.evidence import Cell, Evidence, Status
from prill_harness.run import executor, leases
from prill_harness.run.leases import ANY, FREE, Gpus

FIRST, SECOND, THIRD = (f"GPU-0000000{n}-0000-0000-0000-000000000000" for n in (1, 2, 3))
# A driver of three GPUs that reads CUDA_VISIBLE_DEVICES as the real one does: numbers and UUIDs, in order.
DRIVER = r"""
#include <stdlib.h>
#include <string.h>
static int shown[8], count;
int cuInit(unsigned flags) {
  const char *told = getenv("CUDA_VISIBLE_DEVICES");
  char words[512];
  if (!told) { for (count = 0; count < 3; count++) shown[count] = count; return 0; }
  strncpy(words, told, 511);
  for (char *word = strtok(words, ","); word; word = strtok(NULL, ",")) {
    int number = strncmp(word, "GPU-0000000", 11) ? atoi(word) : word[11] - '1';
    if (number < 0 || number > 2) break;
    shown[count++] = number;
  }
  return 0;
}
int cuDeviceGetCount(int *n) { *n = count; return 0; }
int cuDeviceGet(int *device, int n) { *device = shown[n]; return 0; }
int cuDeviceGetUuid(char *uuid, int device) { memset(uuid, 0, 16); uuid[3] = device + 1; return 0; }
int cuDeviceGetUuid_v2(char *uuid, int device) { return cuDeviceGetUuid(uuid, device); }
"""
SUITE = """
import json, os, signal, time
from pathlib import Path
from prill_harness.run.checks import check

HERE = Path(__file__).parent

@check("turns.one", kills=("rope_pairing",))
def test_one(observe, pytestconfig):
    name = pytestconfig.getoption("prill_model")
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    began = time.monotonic()
    {body}
    HERE.joinpath(name + ".json").write_text(json.dumps([shown, began, time.monotonic()]))
    observe.saw(1, oracle="numpy64")
"""


def cell(engine: str, device: str = "cpu", model: str = "m") -> Cell:
    return Cell(model, engine, "turns", device)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the made-up driver, which children find before any real one; leases lie beside it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler is needed"
    folder = tmp_path / "driver"
    folder.mkdir()
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))
    monkeypatch.setenv(leases.FOLDER, str(tmp_path / "leases"))
    monkeypatch.delenv(leases.VISIBLE, raising=False)
    return folder


def project(folder: Path, gate: str = "", *, models: int = 3, body: str = "time.sleep(0.05)") -> Plan:
    """Cells of a suite that writes down what it was shown, and when."""
    (folder / "suites").mkdir(exist_ok=True)
    (folder / "suites/turns.py").write_text(SUITE.format(body=body))
    (folder / "gates.toml").write_text(
        f"""default = "turns"
[gates.turns]
checklists = ["foundation"]
{gate}
[[gates.turns.plan]]
models = {json.dumps([f"m{n}" for n in range(models)])}
engines = ["numpy"]
suites = ["turns"]
devices = ["cuda"]
"""
    )
    return plan.build(policy.load_policy(folder / "gates.toml").gate(), folder=folder / "suites")


def seen(folder: Path) -> dict[str, tuple[str, float, float]]:
    """Model -> (what it was shown, when it began, when it ended)."""
    return {file.stem: tuple(json.loads(file.read_text())) for file in (folder / "suites").glob("*.json")}


def together(turns: dict[str, tuple[str, float, float]], name: str) -> int:
    """The most cells that ran at once on a GPU."""
    mine = [(began, ended) for shown, began, ended in turns.values() if shown == name]
    return max((sum(b <= began < e for b, e in mine) for began, _ in mine), default=0)


@pytest.mark.parametrize(
    ("engine", "device", "number"),
    [
        ("numpy", "cpu", None),
        ("emu", "cpu", None),
        ("hf", "cpu", None),
        ("cuda", "cpu", ANY),
        ("cuda:fast,budget=2GiB", "cpu", ANY),
        ("cuda:1,fast", "cpu", 1),
        ("cuda+fault:rope_pairing", "cpu", ANY),
        ("hf:cuda", "cpu", ANY),
        ("hf:cuda:2", "cpu", 2),
        ("serve:vllm {model}", "cuda", ANY),
        ("serve:vllm {model}", "cuda:3", 3),
    ],
)
def test_a_cell_says_which_gpu_it_needs(engine: str, device: str, number: int | None) -> None:
    """By its engine or its device: none, whichever is free, or one by its number."""
    assert leases.wanted(cell(engine, device)) == number


@pytest.mark.parametrize(
    ("told", "uuids"),
    [
        (None, (FIRST, SECOND, THIRD)),
        ("2,0", (THIRD, FIRST)),
        (f"{SECOND},{FIRST}", (SECOND, FIRST)),
        ("1", (SECOND,)),
        ("", ()),
        ("-1", ()),
        ("1,9,0", (SECOND,)),
    ],
    ids=str,
)
def test_only_what_the_caller_sees_is_leased(
    driver: Path, monkeypatch: pytest.MonkeyPatch, told: str | None, uuids: tuple[str, ...]
) -> None:
    """A subset, another order, UUIDs, nothing: what the driver makes of it, and no other GPU."""
    if told is not None:
        monkeypatch.setenv(leases.VISIBLE, told)
    assert leases.visible() == uuids


def test_without_a_driver_there_is_nothing_to_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without CUDA has no GPU, and the cell runs, to say so itself."""
    (tmp_path / "libcuda.so.1").write_text("not a library")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert leases.visible() == ()
    assert Gpus((), folder=tmp_path).lease(cell("cuda")) is FREE


def test_a_gpu_is_one_cells_until_it_is_given_back(tmp_path: Path) -> None:
    """Two GPUs serve two cells, of this pool or of another, and a third waits for one."""
    mine, other = (Gpus((FIRST, SECOND), folder=tmp_path) for _ in range(2))
    first, second = mine.lease(cell("cuda")), other.lease(cell("cuda"))
    assert first is not None
    assert second is not None
    assert [lease.environment for lease in (first, second)] == [
        {leases.VISIBLE: FIRST},
        {leases.VISIBLE: SECOND},
    ]
    assert mine.lease(cell("cuda")) is None
    assert mine.lease(cell("numpy")) is FREE
    first.release()
    again = other.lease(cell("cuda"))
    assert again is not None
    assert again.environment == {leases.VISIBLE: FIRST}


def test_a_gpu_asked_for_by_number_is_that_one(tmp_path: Path) -> None:
    """It keeps the numbers of the caller, waits for no other, and one that is not there is for the engine to
    refuse."""
    gpus = Gpus((FIRST, SECOND), folder=tmp_path)
    held = gpus.lease(cell("cuda:1"))
    assert held is not None
    assert (held.environment, gpus.lease(cell("cuda:1,fast"))) == ({}, None)
    assert gpus.lease(cell("cuda:7")) is FREE
    free = gpus.lease(cell("cuda"))
    assert free is not None
    assert free.environment == {leases.VISIBLE: FIRST}


def test_a_policy_lets_several_cells_onto_a_gpu(tmp_path: Path) -> None:
    """Two where it says two, and not a third."""
    work = project(tmp_path, "cells_per_gpu = 2")
    gpus = Gpus((FIRST,), work.cells_per_gpu, tmp_path)
    held = [gpus.lease(cell("cuda")) for _ in range(3)]
    assert [lease is None for lease in held] == [False, False, True]


HOLD = """
import sys, time
from pathlib import Path
from prill_harness.records.evidence import Cell
from prill_harness.run.leases import Gpus
held = Gpus((sys.argv[1],), folder=Path(sys.argv[2])).lease(Cell("m", "cuda", "turns"))
print(held is not None, flush=True)
time.sleep(60)
"""


def test_whoever_is_killed_gives_its_gpu_back(tmp_path: Path) -> None:
    """Another process holds the only GPU; killed with SIGKILL it holds nothing."""
    gpus = Gpus((FIRST,), folder=tmp_path)
    words = [sys.executable, "-c", HOLD, FIRST, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        assert gpus.lease(cell("cuda")) is None
        other.send_signal(signal.SIGKILL)
    assert gpus.lease(cell("cuda")) is not None


@pytest.mark.parametrize(("shown", "jobs", "uses"), [(f"{SECOND},0", 2, {SECOND, FIRST}), ("2", 1, {THIRD})])
def test_cells_take_turns(
    driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: str, jobs: int, uses: set[str]
) -> None:
    """Run by the pool, forked or not: each cell sees one GPU alone before it begins, no two one at the
    same time."""
    monkeypatch.setenv(leases.VISIBLE, shown)
    work = project(tmp_path)
    records = executor.run(work, tmp_path / "out", jobs=jobs)
    assert [r.status for r in records if isinstance(r, Evidence)] == [Status.PASSED] * 3
    turns = seen(tmp_path)
    assert {turn[0] for turn in turns.values()} == uses
    assert [together(turns, name) for name in uses] == [1] * len(uses)


def test_a_cell_that_dies_gives_its_gpu_back(
    driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first kills itself in the middle; the two others get the only GPU after it."""
    monkeypatch.setenv(leases.VISIBLE, "0")
    work = project(tmp_path, body="name == 'm0' and os.kill(os.getpid(), signal.SIGKILL)")
    records = executor.run(work, tmp_path / "out", jobs=2)
    found = {r.cell.model: r.status for r in records if isinstance(r, Evidence)}
    assert found == {"m0": Status.ERROR, "m1": Status.PASSED, "m2": Status.PASSED}
    assert {turn[0] for turn in seen(tmp_path).values()} == {FIRST}


def test_cells_without_a_gpu_do_not_wait_for_one(
    driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While somebody else holds the GPU, the processor's cells are run, and then the other."""
    monkeypatch.setenv(leases.VISIBLE, "0")
    held = Gpus((FIRST,)).lease(cell("cuda"))
    assert held is not None
    work = project(tmp_path, models=1)
    other = Cell("plain", "numpy", "turns")
    events: list[str] = []

    def tell(event: executor.Event) -> None:
        events.append(f"{event.kind} {event.cell.model}")
        if event.cell == other and event.kind == "ended":
            held.release()

    mixed = Plan(work.gate, (*work.cells, other), (), work.folder)
    executor.run(mixed, tmp_path / "out", jobs=2, progress=tell)
    assert events == ["started plain", "ended plain", "started m0", "ended m0"]
    assert seen(tmp_path)["plain"][0] == "0"
