"""The planted faults of cost, and one of a rare path, for the checks that must not pass over them."""

from __future__ import annotations

from prill_harness.faults.catalogue import named

from .planted import Patch, breaks
from .planted_company import FAULTS
from .planted_judges import probed

__all__ = ["FAULTS"]


def planted(patch: Patch, name: str) -> None:
    """Plant one of the catalogue's faults in this process."""
    (fault,) = named((name,))
    for each in fault.patches():
        owner, attribute = each.owner()
        patch.setattr(owner, attribute, each.wrap(getattr(owner, attribute)))


@breaks("cost.token")
def history_walked(patch: Patch) -> None:
    planted(patch, "cost_history_walked")


@breaks("cost.prompt")
def batch_padded(patch: Patch) -> None:
    planted(patch, "cost_batch_padded")


@breaks("cost.text")
def merges_scan_all(patch: Patch) -> None:
    planted(patch, "cost_merges_scan_all")


@breaks("cost.stream")
def stop_keeps_text(patch: Patch) -> None:
    planted(patch, "cost_stop_keeps_text")


@breaks("memory.thousand_requests")
def batch_leaks(patch: Patch) -> None:
    probed(patch, lambda engine: f"{engine}+fault:leak_in_batch")
