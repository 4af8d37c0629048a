"""Run a leaking path again under memray to find the call sites of what was left."""

from __future__ import annotations

import importlib.util

import msgspec

from prill_harness.leaks.judge.hosted import Hosted
from prill_harness.leaks.probed.protocol import LeakSites, Refused
from prill_harness.leaks.reports.report import PathReport, Probe, Site
from prill_harness.numbers.compare import largest

HINT = "the stack that allocated it needs memray: pip install 'prill[memray]'"
TRACER = "prill_harness.leaks.probed.tracer"
SITE_SHARE = 0.5  # share of the leak per call that a call site must account for
SHOWN_SITES = 3
ALLOCATED = ("host", "python")  # ledgers whose leaks come from allocations that memray sees


def located(wanted: Probe, report: PathReport) -> PathReport:
    """The report with the call sites of its leak, or with a hint how to get them."""
    if not any(judged.ledger in ALLOCATED for judged in report.leaks):
        return report
    if importlib.util.find_spec("memray") is None:
        return msgspec.structs.replace(report, stacks=HINT)
    # Without the interposer, for memray replaces the same functions; Python's blocks go through malloc to be
    # seen.
    with Hosted(wanted, TRACER, {"PYTHONMALLOC": "malloc"}) as hosted:
        for message in hosted.messages():
            if isinstance(message, LeakSites):
                found = tuple(site for site in message.sites if _explains(site, report))[:SHOWN_SITES]
                none = "" if found else "no call site of the second run left as many blocks"
                return msgspec.structs.replace(report, sites=found, stacks=none)
            if isinstance(message, Refused):
                return msgspec.structs.replace(report, stacks=f"no stacks: {message.sentence}")
        lines = hosted.said()
        last = lines[-1] if lines else "it printed nothing"
        return msgspec.structs.replace(report, stacks=f"no stacks: the second run ended: {last}")


def _explains(site: Site, report: PathReport) -> bool:
    """Whether a call site left enough to be the leak: in blocks, or in bytes if only bytes grew."""
    blocks = largest(0.0, *(judged.slope for judged in report.leaks if judged.unit == "blocks"))
    if blocks:
        return site.blocks_per_call >= SITE_SHARE * blocks
    return site.bytes_per_call >= SITE_SHARE * max(judged.slope for judged in report.leaks)
