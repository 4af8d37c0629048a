"""Whole probes: what is found on which path and ledger, what stays inconclusive, what a person reads."""

from __future__ import annotations

import gc
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from prill_harness.commands.engines.leak import render
from prill_harness.leaks.judge import judge, sites
from prill_harness.leaks.judge.live import sparkline
from prill_harness.leaks.judge.probe import Conversation, joined, probe, run
from prill_harness.leaks.ledgers import build, device, ledgers, settle
from prill_harness.leaks.ledgers.ledgers import PLANT_EVERY, Book, LeakLedger, Measured, Series
from prill_harness.leaks.probed import protocol
from prill_harness.leaks.reports import bars
from prill_harness.leaks.reports.report import (
    JudgedSeries,
    LeakReport,
    LeakVerdict,
    PathReport,
    Probe,
    amount,
)
from prill_harness.leaks.reports.verdict import Rule
from prill_harness.leaks.selftest import page, selftest
from prill_runtime.errors import Inconclusive, UsageError

from .commandline import emitted, invoke
from .fake_cupti import FakeCupti

CASES = {case.name: case for case in (*bars.BAR, *bars.PLANTED, *bars.CLEAN, *bars.UNDECIDED)}
FEW = (
    "16 bytes, every 8th call, amid churn",
    "only on cancel",
    "only on the 3rd failed allocation",
    "mappings behind libc's back",
    "a block freed twice",
    "a tracker that reports a constant",
    "a silent cache of 5000 prompts that never fills",
    "a cache of 30, entered by every call",
)


@pytest.fixture(autouse=True, scope="module")
def few_objects() -> Iterator[None]:
    """As in the process that measures: what lived before is no part of the collection before each reading."""
    settle.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", FEW)
def test_a_known_engine_comes_out_as_it_must(name: str) -> None:
    """Leaks are found on their path and ledger; what cannot be told is inconclusive; caches are clean."""
    case = CASES[name]
    report = run(case.probe(0))
    assert selftest.right(case, report), report.sentence


def test_a_probe_has_a_time_limit() -> None:
    """A path that takes too long is inconclusive and says so; nothing is left running."""
    report = run(Probe("control:noise=pool", "none", timeout_s=0.05))
    assert report.verdict is LeakVerdict.INCONCLUSIVE
    assert "timed out after 0.05 s" in report.sentence


def test_an_engine_that_cannot_be_opened_is_no_clean_one() -> None:
    """An engine elsewhere, an unknown one and an unknown path each end with a sentence, never with clean."""
    assert "another process" in run(Probe("http:localhost:1", "none")).sentence
    assert run(Probe("nowhere", "none")).verdict is LeakVerdict.BROKEN
    with pytest.raises(UsageError, match="no such path"):
        run(Probe("control:", "none", "sideways"))


class Fake(LeakLedger):
    """Readings from a list; plants are counted and shown, unless it is blind."""

    def __init__(self, values: list[int], *, blind: bool = False) -> None:
        self.series = (Series("host", "blocks", "blocks", Rule.EXACT),)
        self._values, self._blind, self._plants = iter(values), blind, 0

    def read(self) -> list[int]:
        return [next(self._values) + (0 if self._blind else self._plants)]

    def plant(self) -> dict[str, int]:
        self._plants += 1
        return {"blocks": 1}


def book(values: list[int], *, blind: bool = False) -> Book:
    made = Measured([Fake(values, blind=blind)], len(values))
    for _ in values:
        made.close_call()
    return made


def test_plants_are_taken_off_and_must_show() -> None:
    """A flat ledger is clean with the plants in it; one that does not show them is inconclusive."""
    seeing = judge.Phase(book([100] * 50), 11)
    assert seeing.planted == {"host": True}
    assert [j.verdict for j in seeing.judged()] == [LeakVerdict.CLEAN]
    assert sum(seeing.judged()[0].values) == 41 * 100
    blind = judge.Phase(book([100] * 50, blind=True), 11)
    assert blind.open
    assert [j.verdict for j in judge.Phase(book([100] * 90, blind=True), 11, doubled=True).judged()] == [
        LeakVerdict.INCONCLUSIVE
    ]


def test_a_leak_is_told_in_one_sentence() -> None:
    """The sentence has the rate, its interval, the first measured call and the windows."""
    phase = judge.Phase(book([100 + call // PLANT_EVERY for call in range(1, 51)]), 11)
    assert phase.leaks
    (found,) = phase.judged()
    assert found.verdict is LeakVerdict.LEAK
    assert found.sentence.startswith("host: 0.125 blocks per call (")
    assert found.sentence.endswith("since call 11, 5 of 5 windows")


class Scripted:
    """Stands for the process that measures: what it says, and what it is told."""

    late = False

    def __init__(self, *said: Any) -> None:
        self._said, self.told = said, []

    def messages(self) -> Iterator[Any]:
        return iter(self._said)

    def command(self, words: bytes) -> None:
        self.told.append(words)


@pytest.mark.parametrize(("on_device", "expected"), [(False, protocol.WALK), (True, protocol.END)])
def test_failed_loads_are_walked_where_cupti_is_not_attached(on_device: bool, expected: bytes) -> None:
    """CUPTI keeps memory of the host for every load: beside it a failed one would look like a leak."""
    flat = book([100] * 50)
    said = Scripted(protocol.Opened(flat.series, {}, False), protocol.Rows.of(flat, 11), protocol.Finished())
    wanted = Probe("control:", "none", "load", device=on_device)
    Conversation(wanted, said, lambda probe, call: None).report()  # type: ignore[arg-type]
    assert said.told == [expected]


def test_names_of_attributes_that_python_remembers_are_no_leak() -> None:
    """An extension composes a name for every lookup; CPython keeps it in a table of thousands of places."""
    device = type("Device", (), {f"attribute_{n}": n for n in range(300)})()
    names = [f"attribute_{n}" for n in range(300)]  # as many at any time, each call three of them anew
    counted = Measured([ledgers.PythonBlocks(50)], 50)
    for call in range(50):
        for n in range(3 * call, 3 * call + 3):
            names[n * 7 % 300] = name = f"attribute_{n}"
            assert getattr(device, name) == n
            names[n * 11 % 300] = f"attribute_{n}"
        name = ""
        counted.close_call()
    phase = judge.Phase(counted, 11)
    assert [j.verdict for j in phase.judged()] == [LeakVerdict.CLEAN], phase.judged()[0].sentence


def test_a_missing_ledger_forbids_clean() -> None:
    """Where a ledger could not be attached the verdict is inconclusive and says which."""
    clean = [JudgedSeries("host", "blocks", "blocks", LeakVerdict.CLEAN, "host: no growth", (1, 1))]
    report = judge.concluded(Probe("x", "y"), book([1] * 50), clean, True, {"device": "no CUPTI"})
    assert report.verdict is LeakVerdict.INCONCLUSIVE
    assert report.sentence == "device: no CUPTI"
    assert judge.concluded(Probe("x", "y"), book([1] * 50), clean, True, {}).verdict is LeakVerdict.CLEAN
    assert (
        judge.concluded(Probe("x", "y"), book([1] * 50), clean, False, {}).verdict is LeakVerdict.INCONCLUSIVE
    )


def test_stacks_name_the_function() -> None:
    """Under memray the function of the control library that leaks is named, with its bytes per call."""
    wanted = Probe("control:leak=list,size=64", "none")
    leaky = PathReport("success", LeakVerdict.LEAK, "", seen=(
        JudgedSeries("host", "blocks", "blocks", LeakVerdict.LEAK, "", slope=1.0),))  # fmt: skip
    pytest.importorskip("memray")
    found = sites.located(wanted, leaky)
    assert "control_grow_list" in " ".join(found.sites[0].stack), found.stacks
    assert 72 <= found.sites[0].bytes_per_call <= 80


def test_without_memray_the_report_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint names the extra."""
    monkeypatch.setattr(sites.importlib.util, "find_spec", lambda name: None)
    leaky = PathReport(
        "success", LeakVerdict.LEAK, "", seen=(JudgedSeries("host", "bytes", "B", LeakVerdict.LEAK, ""),)
    )
    assert "pip install 'prill[memray]'" in sites.located(Probe("x", "y"), leaky).stacks


REPORT = LeakReport(
    "numpy<b>", "fixture:llama-tiny", LeakVerdict.LEAK, "success: host: 24 B per call", (
        PathReport("success", LeakVerdict.LEAK, "host: 24 B per call", 50, 11, True, (
            JudgedSeries("host", "bytes", "B", LeakVerdict.LEAK, "host: 24 B per call",
                         tuple(range(0, 984, 24)), 24.0, 23.5, 24.5, 960, 0, 5, 5),
            JudgedSeries("python", "blocks", "blocks", LeakVerdict.CLEAN, "python: no growth", (7,) * 41,
                         of=5),
        )),
    ), "prill leak --engine numpy",
)  # fmt: skip


def test_the_page_draws_the_curve() -> None:
    """One SVG for the series that moved, a point for each reading, slope and interval; text escaped."""
    page = render("html", REPORT)
    assert "numpy&lt;b&gt;" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    drawn = page[page.index("<svg") : page.index("</svg>") + 6]
    picture = ElementTree.fromstring(drawn)
    (line,) = picture.findall("polyline")
    assert len(line.attrib["points"].split()) == 41
    assert page.count("<svg") == 1
    assert "24 B per call (23.5 B to 24.5 B), 5 of 5 windows grew" in page


def test_the_command_speaks_json_and_exit_codes() -> None:
    """A leak is exit code 1 with one JSON document; a clean engine 0; a usage error 4."""
    leaky = invoke(
        "leak", "--engine", "control:leak=block,on=error", "--model", "none", "--path", "error", "--json"
    )
    assert leaky.exit_code == 1
    told = emitted(leaky.stdout)
    assert told["verdict"] == "leak"
    assert told["paths"][0]["planted"] is True
    clean = invoke("leak", "--engine", "control:", "--model", "none", "--path", "cancel")
    assert clean.exit_code == 0
    assert "cancel: no ledger grew in 40 calls after 10 of warm-up" in clean.stdout
    assert invoke("leak").exit_code == 4
    assert invoke("leak", "--model", "none", "--calls", "20").exit_code == 4


def test_several_paths_are_one_report() -> None:
    """The worst path decides; each is in a process of its own and named in the sentence."""
    report = probe(Probe("control:leak=descriptor,on=session", "none", vary=False), ("success", "session"))
    assert [path.verdict for path in report.paths] == [LeakVerdict.CLEAN, LeakVerdict.LEAK]
    assert report.exit_code == 1
    assert report.sentence.startswith("session: process descriptors:")


def test_records_of_the_device_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUPTI's allocations and releases add up by kind; other records and kinds are left alone."""
    fake = FakeCupti()
    monkeypatch.setattr(device, "import_module", {"cupti.cupti": fake}.__getitem__)
    records = device.Records()
    assert fake.enabled == {int(fake.ActivityKind.MEMORY2)}
    for at, size, kind in ((1, 64, "DEVICE"), (2, 100, "DEVICE"), (3, 4096, "PINNED"), (4, 999, "PAGEABLE")):
        fake.allocated(at, size, kind)
    fake.released(1, 64)
    fake.allocated(5, 8, "MANAGED")
    fake.waiting.append(replace(fake.waiting[0], kind=int(fake.ActivityKind.MEMORY)))
    assert records.read() == {"device": [1, 100], "pinned": [1, 4096], "managed": [1, 8]}
    assert fake.buffer == (device.BUFFER_BYTES, 0), "no limit on the records of a buffer"


def test_a_module_that_is_loaded_again_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its variables have no record of a release: at the same address they are the same, elsewhere more."""
    fake = FakeCupti()
    monkeypatch.setattr(device, "import_module", {"cupti.cupti": fake}.__getitem__)
    records = device.Records()
    for at, blocks in ((1, 1), (1, 1), (1, 1), (2, 2)):
        fake.allocated(at, 136, "DEVICE_STATIC")
        assert records.read()["device"] == [blocks, 136 * blocks]


@pytest.mark.parametrize("granule", [1, 512])
def test_a_plant_on_the_device_is_what_the_records_say(granule: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted block is taken off as large as CUPTI gives it; one it does not show counts as not found."""
    fake, driver = FakeCupti(), cast("device.Driver", None)
    monkeypatch.setattr(device, "import_module", {"cupti.cupti": fake}.__getitem__)
    ledger, addresses = device.DeviceLedger("pinned", device.Records(), driver), iter(range(1, 9))

    def take(driver: object, kind: str, size: int) -> int:
        at = next(addresses)
        if at < 3:
            fake.allocated(at, -(-size // granule) * granule, kind.upper())
        return at

    monkeypatch.setattr(device, "take", take)
    size = max(16, granule)
    assert [ledger.plant() for _ in range(3)] == [{"blocks": 1, "bytes": n} for n in (size, size, 16)]
    assert ledger.read() == (2, 2 * size)


def test_records_end_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was recorded is taken in when recording ends, and nothing is recorded after."""
    fake = FakeCupti()
    monkeypatch.setattr(device, "import_module", {"cupti.cupti": fake}.__getitem__)
    records = device.Records()
    fake.allocated(1, 64)
    records.close()
    fake.allocated(2, 64)
    assert records.blocks["device"] == {1: 64}
    assert not fake.waiting


def test_without_a_gpu_the_device_ledger_is_not_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    """No CUPTI: inconclusive, with what to install; the examination counts that as not measured."""

    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(device, "import_module", absent)
    with pytest.raises(Inconclusive, match=r"not attached.*prill\[cuda\]"):
        device.attached(0)


def part(verdict: LeakVerdict, sentence: str, *series: str, planted: bool = True) -> PathReport:
    seen = tuple(JudgedSeries(name, "bytes", "B", verdict, sentence) for name in series)
    return PathReport("success", verdict, sentence, 50, 11, planted, seen, duration_s=1.5)


def test_an_engine_on_a_gpu_is_clean_where_both_its_runs_are() -> None:
    """The worse run of the two decides and speaks; plants must show in both; all series are in one report."""
    host, device = (
        part(LeakVerdict.CLEAN, "no ledger grew", "host"),
        part(LeakVerdict.CLEAN, "none", "device"),
    )
    both = joined(host, device)
    assert (both.verdict, both.sentence, both.duration_s) == (LeakVerdict.CLEAN, "no ledger grew", 3.0)
    assert [judged.ledger for judged in both.seen] == ["host", "device"]
    assert not both.missing
    assert not joined(host, part(LeakVerdict.CLEAN, "none", "device", planted=False)).planted
    leak = part(LeakVerdict.LEAK, "device: 64 B per call", "device")
    assert (joined(host, leak).verdict, joined(host, leak).sentence) == (LeakVerdict.LEAK, leak.sentence)
    other = part(LeakVerdict.LEAK, "host: 24 B per call", "host")
    assert joined(other, leak).sentence == "host: 24 B per call; device: 64 B per call"
    blind = part(LeakVerdict.INCONCLUSIVE, "the device ledger is not attached")
    assert joined(host, blind).verdict is LeakVerdict.INCONCLUSIVE
    assert joined(host, blind).missing == {"device": blind.sentence}
    assert joined(other, blind).sentence == other.sentence


def test_the_ledgers_of_a_device_are_read_alone() -> None:
    """What records them takes memory of the host: no ledger of the host is read beside them."""

    class Constant(LeakLedger):
        series = (Series("device", "blocks", "blocks", Rule.EXACT),)

        def read(self) -> tuple[int]:
            return (7,)

    book, missing = ledgers.opened(3, lambda: {"cache": 1}, [Constant()])
    book.close_call()
    assert [series.ledger for series in book.series] == ["device"]
    assert book.rows[0].tolist() == [7]
    assert not missing


def test_the_bars_cover_what_was_asked() -> None:
    """60 runs of the bar, 200 clean ones and more, both embedded engines on every path, every size."""
    assert sum(case.runs for case in bars.BAR) == 60
    assert all(case.most_calls == 50 for case in bars.BAR)
    assert sum(case.runs for case in bars.CLEAN) >= 200
    planted = " ".join(case.engine for case in bars.PLANTED)
    for size, every in [(s, e) for s in (1, 16, 64, 4096) for e in (1, 8)]:
        assert f"size={size},every={every}," in planted
    probed = {(case.engine, case.path) for case in bars.CLEAN}
    assert {(e, p) for e in ("numpy", "numpy64") for p in ("error", "cancel", "load", "session")} <= probed


def test_figures_for_people() -> None:
    """Bytes get their unit, a sparkline spans least to greatest, a flat one stays low."""
    assert [amount(v) for v in (24, 1536, 3 << 20)] == ["24 B", "1.5 KiB", "3 MiB"]
    assert amount(0.125, "blocks") == "0.125 blocks"
    assert sparkline([0, 1, 2, 3]) == "▁▃▅█"
    assert sparkline([5, 5]) == "▁▁"


def test_the_libraries_are_data_of_the_package() -> None:
    """Both C files and the guide lie beside the modules that use them."""
    assert {"interposer.c", "control.c"} <= {file.name for file in Path(build.__file__).parent.iterdir()}
    assert Path(page.__file__).with_name("guide.md").is_file()
