"""Leak probes: ledgers that are exact to the byte, windows that must all grow, a verdict of three words."""

from __future__ import annotations

from prill_harness.leaks.report import Judged, PathReport, Probe, Report, Verdict

__all__ = ["Judged", "PathReport", "Probe", "Report", "Verdict"]
