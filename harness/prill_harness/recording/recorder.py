"""The pytest plugin that records planned checks and evidence, on disk before the next check begins."""

from __future__ import annotations

import platform
import shutil
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from prill_harness.faults import catalogue
from prill_harness.plan import provenance
from prill_harness.records.evidence import (
    ENGINE_VERSION,
    EXIT_CODES,
    Cell,
    CellEnded,
    CellStarted,
    CheckStarted,
    Evidence,
    Record,
    Status,
    badness,
    builtin,
)
from prill_harness.records.ledger import Ledger, decode, encode
from prill_harness.records.names import base_of
from prill_harness.run import outcomes, reproduce
from prill_harness.run.checks import Observer, content_hash
from prill_runtime.errors import MissingCapability

OBSERVER = pytest.StashKey[Observer]()
ATTRIBUTE = "prill_evidence"


class Planned(msgspec.Struct, frozen=True):
    """One collected check, as far as it is known before it runs."""

    nodeid: str
    check: str
    content: str
    kills: tuple[str, ...]
    cell: Cell
    file: str
    spec: str

    @property
    def reproduce(self) -> str:
        """The shell command that runs this check alone, or the whole suite if it did not load."""
        return reproduce.cell(self.cell, self.spec, *([self.check] if self.nodeid else []))

    def evidence(self, status: Status, sentence: str, **rest: Any) -> Evidence:
        """Evidence of this check."""
        rest = {"observed": 0, "oracle": "", "at": time.time(), **rest}
        return Evidence(
            check=self.check,
            content=self.content,
            cell=self.cell,
            status=status,
            sentence=sentence,
            kills=self.kills,
            reproduce=self.reproduce,
            **rest,
        )


class Recorder:
    """Registered only for runs with `--prill-` options; with xdist only the controller writes."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.worker: dict[str, Any] | None = getattr(config, "workerinput", None)
        self.planned: dict[str, Planned] = {}
        self.evidence: dict[str, Evidence] = {}
        self.broken: list[str] = []
        self.oracle: object = None  # set by its fixture, so that its errors are not the engine's
        self.engine_version = ""  # set by its fixture: what an engine of others says of itself
        self._phases: dict[str, list[tuple[Status, str]]] = {}
        self._durations: dict[str, float] = {}
        self._lacks: dict[str, tuple[str, ...]] = {}
        self._began = time.time()
        self._shared: Path | None = None  # folder where xdist's workers leave the plan
        path = config.getoption("prill_ledger")
        self._ledger = Ledger(path) if path and self.worker is None else None

    # --- collection -------------------------------------------------------------------------------------

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            cause = outcomes.one_line(lines[-1][2:] if lines else str(report.longrepr))
            self.broken.append(f"{report.nodeid or 'collection'}: {cause}")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        wanted = set(config.getoption("prill_check") or ())
        if wanted:
            dropped = [i for i in items if not wanted & {check_id(i), base_of(check_id(i))}]
            config.hook.pytest_deselected(items=dropped)
            items[:] = [i for i in items if i not in dropped]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        plan = [self._plan(item) for item in session.items if item.get_closest_marker("prill_check")]
        self.planned = {p.nodeid: p for p in plan}
        known = catalogue.known()
        for p in plan:
            for name in (n for n in p.kills if n not in known):
                raise pytest.UsageError(
                    f"check {p.check} claims to kill {name!r}, which is no planted fault; "
                    "`prill faults list` shows them"
                )
        unmarked = [item.nodeid for item in session.items if item.nodeid not in self.planned]
        if unmarked and self.config.getoption("prill_ledger"):
            raise pytest.UsageError(f"{unmarked[0]} is not marked with @check, so it leaves no evidence")
        seen: set[tuple[str, str]] = set()
        for p in plan:
            if (p.cell.id, p.check) in seen:
                raise pytest.UsageError(f"check id {p.check} is used twice in suite {p.cell.suite}")
            seen.add((p.cell.id, p.check))
        if self.worker is None:
            self._begin()
        elif "prill_plan" in self.worker:
            partial = Path(self.worker["prill_plan"], f"{self.worker['workerid']}.partial")
            partial.write_bytes(msgspec.json.encode(plan))
            partial.replace(partial.with_name("plan.json"))

    def _plan(self, item: pytest.Item) -> Planned:
        marker = item.get_closest_marker("prill_check")
        assert marker is not None
        option = self.config.getoption
        return Planned(
            nodeid=item.nodeid,
            check=check_id(item),
            content=content_hash(item.function),  # type: ignore[attr-defined]
            kills=tuple(marker.kwargs["kills"]),
            cell=self._cell(item.path.stem),
            file=str(item.path),
            spec=option("prill_model") or "none",
        )

    def _cell(self, suite: str) -> Cell:
        """The cell of this run; its suite is `suite` unless the run names one."""
        option = self.config.getoption
        return Cell(
            model=option("prill_model_name") or option("prill_model") or "none",
            engine=option("prill_engine"),
            suite=option("prill_suite") or suite,
            device=option("prill_device"),
        )

    def _begin(self) -> None:
        self._began = time.time()
        plans: dict[Cell, list[Planned]] = {}
        for p in self.planned.values():
            plans.setdefault(p.cell, []).append(p)
        for cell, plan in plans.items():
            checks = self.config.getoption("prill_check") or ()
            versions = {}
            if self._ledger:
                versions = provenance.describe(plan[0].spec, Path(plan[0].file), checks, cell.engine)
            assumed = provenance.assumed(plan[0].spec) if self._ledger else ()
            checks = tuple(sorted(p.check for p in plan))
            self._start(cell, checks, versions, assumed)

    def _start(
        self,
        cell: Cell,
        checks: tuple[str, ...],
        versions: dict[str, str] | None = None,
        assumed: tuple[tuple[str, str, str], ...] = (),
    ) -> None:
        host = platform.node()
        self._write(CellStarted(cell, checks, self._began, versions or {}, assumptions=assumed, host=host))

    # --- one check --------------------------------------------------------------------------------------

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.worker is None and nodeid in self.planned:
            planned = self.planned[nodeid]
            self._write(CheckStarted(planned.cell, planned.check, time.time()))

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        marker = item.get_closest_marker("prill_check")
        if marker is None or not marker.kwargs["needs"]:
            return
        engine = item._request.getfixturevalue("engine")  # type: ignore[attr-defined]
        missing = sorted(set(map(str, marker.kwargs["needs"])) - set(map(str, engine.info.capabilities)))
        if missing:
            self._lacks[item.nodeid] = tuple(missing)
            raise MissingCapability(f"engine {engine.info.name} does not offer {', '.join(missing)}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        planned = self.planned.get(item.nodeid)
        if planned is None:
            return report
        observer = item.stash.setdefault(OBSERVER, Observer())
        found = self._phases.setdefault(item.nodeid, [])
        self._durations[item.nodeid] = self._durations.get(item.nodeid, 0.0) + report.duration
        if call.when == "call" and item.get_closest_marker("xfail"):
            found.append((Status.INCONCLUSIVE, "marked as an expected failure; an xfail is no evidence"))
        elif call.excinfo is not None:
            found.append(outcomes.raised(call.excinfo.value, phase=call.when, oracle=self.oracle))
            observer.detail.setdefault("message", builtin(str(call.excinfo.value))[:4000])
        elif call.when == "call":
            found.append(outcomes.finished(observer))
        if call.when != "teardown" and found and found[-1][0] is not Status.PASSED and not report.failed:
            report.outcome, report.longrepr = "failed", found[-1][1]  # no evidence: must not be green
        if call.when == "teardown":
            setattr(report, ATTRIBUTE, self._sealed(planned, observer))
        return report

    def _sealed(self, planned: Planned, observer: Observer) -> str:
        """The evidence as JSON; if it cannot be encoded, that is an error of the check, not of the run."""
        try:
            sealed = encode(self._conclude(planned, observer))
            decode(sealed)
            return sealed.decode()
        except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
            sentence = f"the evidence cannot be recorded: {outcomes.one_line(str(error))}"
            return encode(planned.evidence(Status.ERROR, sentence)).decode()

    def _conclude(self, planned: Planned, observer: Observer) -> Evidence:
        phases = self._phases.pop(planned.nodeid)
        bad = [phase for phase in phases if phase[0] is not Status.PASSED]
        status, sentence = (bad or phases or [(Status.ERROR, "the check left no outcome")])[0]
        lacks = self._lacks.pop(planned.nodeid, ())
        return planned.evidence(
            status,
            sentence,
            observed=int(observer.observed),
            oracle=builtin(observer.oracle),
            metrics=tuple(observer.metrics),
            seed=None if observer.seed is None else int(observer.seed),
            digests=self._told() | {str(k): builtin(str(v)) for k, v in observer.digests.items()},
            detail=builtin(observer.detail),
            duration_s=round(self._durations.pop(planned.nodeid), 6),
            lacks=lacks if len(bad) == 1 else (),
        )

    def _told(self) -> dict[str, str]:
        return {ENGINE_VERSION: builtin(self.engine_version)} if self.engine_version else {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        planned = self.planned.get(report.nodeid)
        if self.worker is not None or planned is None:
            return
        sent = getattr(report, ATTRIBUTE, None)
        if sent is not None and isinstance(evidence := decode(sent), Evidence):
            self._settle(planned, evidence)
        elif report.when not in ("setup", "call", "teardown"):  # xdist's own report of a worker that died
            text = outcomes.one_line(str(report.longrepr))
            self._settle(planned, planned.evidence(Status.ERROR, f"the process died in the check: {text}"))

    def _settle(self, planned: Planned, evidence: Evidence) -> None:
        self.evidence[planned.nodeid] = evidence
        self._write(evidence)

    def _write(self, record: Record) -> None:
        if self._ledger is not None:
            attempt = self.config.getoption("prill_attempt")
            self._ledger.append(msgspec.structs.replace(record, attempt=attempt))

    # --- the end ----------------------------------------------------------------------------------------

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.worker is not None:
            return
        if self.broken:
            self._collection_broke()
        elif int(exitstatus) in (2, 4):  # interrupted or misused: the cell stays open, so a resume runs it
            return
        for nodeid, planned in self.planned.items():
            if nodeid not in self.evidence:
                sentence = "the check was planned but left no evidence"
                self._settle(planned, planned.evidence(Status.ERROR, sentence))
        session.exitstatus = code = self._exit_code(int(exitstatus))
        now = time.time()
        for cell in dict.fromkeys(p.cell for p in self.planned.values()):
            self._write(CellEnded(cell, code, round(now - self._began, 6), now))

    def _collection_broke(self) -> None:
        """Report a suite that cannot be collected as one planned check with an error."""
        cell = self._cell("suite")
        planned = Planned(
            "", f"{cell.suite}.collection", "", (), cell, "", self.config.getoption("prill_model") or "none"
        )
        self.planned, self.evidence = {"": planned}, {}
        self._start(cell, (planned.check,))
        self._settle(planned, planned.evidence(Status.ERROR, f"the suite did not load: {self.broken[0]}"))

    def _exit_code(self, own: int) -> int:
        """pytest's exit code, or a worse one by the evidence; never 0 if any evidence did not pass."""
        statuses = {e.status for e in self.evidence.values()}
        if statuses <= {Status.PASSED}:
            return own
        return 3 if own == 3 else EXIT_CODES[min(statuses, key=badness)]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for evidence in self.evidence.values():
            if evidence.status is not Status.PASSED:
                terminalreporter.write_line(f"{evidence.status} {evidence.check}: {evidence.sentence}")

    def pytest_unconfigure(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
        if self._shared is not None:
            shutil.rmtree(self._shared, ignore_errors=True)

    # --- xdist ------------------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_report_to_serializable(self) -> Generator[None, dict[str, Any], dict[str, Any]]:
        """Make reports portable: execnet would drop one with a lone surrogate, and the run exit 0."""
        return portable((yield))  # type: ignore[no-any-return]

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        if self._shared is None:
            self._shared = Path(tempfile.mkdtemp(prefix="prill-plan-"))
        node.workerinput["prill_plan"] = str(self._shared)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self) -> None:
        if not self.planned and self._shared is not None and (self._shared / "plan.json").exists():
            plan = msgspec.json.decode((self._shared / "plan.json").read_bytes(), type=list[Planned])
            self.planned = {p.nodeid: p for p in plan}
            self._begin()


def check_id(item: pytest.Item) -> str:
    """`suite.name` or `suite.name[parameter]`; empty for an item that is not a check."""
    marker = item.get_closest_marker("prill_check")
    if marker is None:
        return ""
    callspec = getattr(item, "callspec", None)
    name = str(marker.kwargs["name"])
    return builtin(f"{name}[{callspec.id}]") if callspec else name


def portable(value: Any) -> Any:
    """The same structure in types that execnet can carry: text re-encoded, foreign scalars converted."""
    if type(value) in (dict, list, tuple):
        if type(value) is dict:
            return {portable(k): portable(v) for k, v in value.items()}
        return type(value)(portable(v) for v in value)
    if value is None or type(value) in (bool, int, float, bytes):
        return value
    return builtin(value)
