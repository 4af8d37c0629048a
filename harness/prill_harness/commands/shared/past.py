"""What a gate takes from earlier runs: the history and the incident log."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from prill_harness.console import Console
from prill_harness.incidents import history, log
from prill_harness.records.evidence import Record
from prill_harness.records.verdict import IncidentResult, StandingResult
from prill_runtime.errors import OutputError


def incidents(folder: Path | None, checks: Collection[str]) -> tuple[IncidentResult, ...]:
    """The incident log as a verdict carries it; None: ci/incidents, if it is there.

    Raises:
        IncidentError: as `log.load` and `log.examine`.
    """
    found, where = log.load(folder), folder or log.LOCAL
    log.examine(found, where, checks)
    return log.results(found, where)


class Past:
    """The history beside one gate that ran."""

    def __init__(
        self,
        console: Console,
        place: Path,
        gate: str,
        records: Iterable[Record],
        open_: Sequence[IncidentResult],
    ) -> None:
        """Read the history, and name the lines that are none."""
        self.place, self._console = place, console
        self.now = history.gate_run(gate, records, open_)
        self._runs, notes = history.read(place)
        for note in notes:
            console.remark(f"history: {note}", status="inconclusive")

    @property
    def standings(self) -> Mapping[tuple[str, str], StandingResult]:
        """What it says of each check that fails now or is unsteady, by (cell id, check id)."""
        return history.standings(self._runs, self.now)

    def keep(self) -> None:
        """Write this run behind the others; a history that cannot be written costs no verdict."""
        try:
            history.append(self.place, self.now)
        except OutputError as error:
            self._console.remark(str(error), status="inconclusive")
