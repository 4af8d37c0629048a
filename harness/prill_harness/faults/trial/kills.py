"""kills.json: which check, with which code, was seen to kill which planted fault.

A kill counts only while the check's content hash and the fault's source are the recorded ones. A passing
check that lacks one of the kills it claims proves nothing to a gate. A kill seen once is owed until it is
seen again or `forgotten.toml` gives a reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import msgspec

from prill_harness.planting.faults import Fault
from prill_harness.records.catalog import packaged
from prill_harness.run import reproduce
from prill_runtime.errors import KillsError
from prill_runtime.files import refuse_pipe

FILE = "kills.json"


class FaultTrial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One fault as the matrix saw it.

    Attributes:
        source: sha256 of the fault's code.
        model: the model spec it was run on.
        blamed: the stage kinds or parts that its evidence points at; empty when it survived.
        killed_by: ids of the checks that failed on it and pass without it, without parameters.
    """

    source: str
    area: str
    summary: str
    blames: tuple[str, ...]
    model: str
    blamed: tuple[str, ...]
    killed_by: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Killed, and blamed on what is broken."""
        return bool(self.killed_by) and bool(set(self.blamed) & set(self.blames))


class Clean(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Runs of engines without a fault: how many alarmed, and how close the noisiest came to its bound.

    Attributes:
        worst: model spec -> largest figure over its bound, to two digits.
        checks: of the suites, run on clean engines over all models; suite_alarms: how many of these alarmed.
    """

    runs: int = 0
    alarms: int = 0
    worst: dict[str, float] = {}
    checks: int = 0
    suite_alarms: int = 0


class Kills(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The kill matrix as data: faults by name, content hashes of the checks by id, the clean runs.

    Attributes:
        owed: fault -> checks that once killed it and have not been seen to since.
        observed: id of a cell of packaged models and a clean engine -> check with its parameter -> how many
            values it compared there.
    """

    faults: dict[str, FaultTrial] = {}
    checks: dict[str, str] = {}
    clean: Clean = Clean()
    owed: dict[str, tuple[str, ...]] = {}
    observed: dict[str, dict[str, int]] = {}
    schema: int = 1

    def killed_by(self, check: str) -> tuple[str, ...]:
        """The faults that the check was seen to kill."""
        return tuple(name for name, trial in sorted(self.faults.items()) if check in trial.killed_by)

    def current(self, check: str, contents: Collection[str], claimed: Collection[str]) -> bool:
        """Whether the check, with its present code, was seen to kill every fault that it claims."""
        same = set(contents) == {self.checks.get(check)}
        return same and bool(claimed) and not self.unkept(check, claimed)

    def unkept(self, check: str, claimed: Collection[str]) -> tuple[str, ...]:
        """The faults that a check claims and was not seen to kill."""
        return tuple(sorted(set(claimed) - set(self.killed_by(check))))

    @property
    def pairs(self) -> frozenset[tuple[str, str]]:
        """Every (fault, check) that was ever seen, still owed or not."""
        seen = [(name, check) for name, trial in self.faults.items() for check in trial.killed_by]
        owed = [(name, check) for name, checks in self.owed.items() for check in checks]
        return frozenset(seen + owed)


def digest(fault: Fault) -> str:
    """sha256 of the fault's code, helpers included (hex)."""
    return hashlib.sha256(fault.code.encode()).hexdigest()


def fresh(kills: Kills, catalogue: Mapping[str, Fault]) -> Kills:
    """The matrix without faults whose code has changed."""
    kept = {
        name: trial
        for name, trial in kills.faults.items()
        if name in catalogue and digest(catalogue[name]) == trial.source
    }
    return msgspec.structs.replace(kills, faults=kept)


def merge(old: Kills, new: Kills) -> Kills:
    """Both matrices as one; kills by a check's former code no longer count."""
    changed = {check for check, content in new.checks.items() if old.checks.get(check, content) != content}
    kept = {
        name: msgspec.structs.replace(trial, killed_by=tuple(sorted(set(trial.killed_by) - changed)))
        for name, trial in old.faults.items()
    }
    clean = new.clean if new.clean.runs else old.clean
    return Kills(kept | new.faults, old.checks | new.checks, clean, observed=old.observed | new.observed)


def default_file(folder: Path | None = None) -> Path:
    """Path of the matrix for the suites in `folder` (None: the packaged ones): it lies beside them."""
    return (folder or packaged()) / FILE


def load(path: Path | None = None, folder: Path | None = None) -> Kills:
    """Read a matrix: `path`, or the one beside the suites; if absent, an empty one, which proves nothing.

    Raises:
        KillsError: `path` does not exist, or a file is not such a matrix.
    """
    file = path or default_file(folder)
    try:
        refuse_pipe(file)
        return msgspec.json.decode(file.read_bytes(), type=Kills)
    except FileNotFoundError:
        if path is None:
            return Kills()
        hint = "write it with `prill faults matrix -o`"
        raise KillsError("no such kill matrix", where=str(file), hint=hint) from None
    except OSError as error:
        raise KillsError("the kill matrix cannot be read", where=str(file), got=error.strerror) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise KillsError("not a kill matrix", where=str(file), got=str(error)) from error


def encode(kills: Kills) -> str:
    """The matrix as sorted JSON: the same runs give the same bytes."""
    return msgspec.json.format(msgspec.json.encode(kills, order="sorted"), indent=1).decode() + "\n"


def with_own(kills: Kills, own: Kills, checks: Collection[str]) -> Kills:
    """The packaged matrix, with what `own`, of a user's suites, says of `checks`, which are theirs."""
    faults = dict(kills.faults)
    for name, trial in own.faults.items():
        before = faults[name].killed_by if name in faults else ()
        mine = tuple(check for check in trial.killed_by if check in checks)
        faults[name] = msgspec.structs.replace(faults.get(name, trial), killed_by=(*before, *mine))
    contents = {check: content for check, content in own.checks.items() if check in checks}
    return msgspec.structs.replace(kills, faults=faults, checks=kills.checks | contents)


def remedy(faults: Iterable[str], folder: Path | None = None) -> str:
    """The command that renews the kills of these faults, by suites in `folder`; None: the packaged."""
    if folder is not None:
        folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        return reproduce.shell(["faults", "matrix", "--suites", str(folder)])
    return " ".join(["prill faults matrix", *(f"--only {name}" for name in sorted(faults))])
