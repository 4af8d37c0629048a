"""The lists and tables of a page, from a verdict; worst first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from prill_harness.leaks.reports import curves
from prill_harness.leaks.reports.report import amount
from prill_harness.records.evidence import Cell, Status, badness
from prill_harness.records.verdict import (
    AttemptResult,
    CheckResult,
    IncidentResult,
    IncidentState,
    ItemResult,
    ItemStatus,
    Severity,
    StandingResult,
    Verdict,
    WaiverResult,
)
from prill_reports.curves import Frame, Picture, drawn
from prill_reports.text import figure, one_line

FEW = 6  # facts of a mapping that fit on one line
AROUND = 8  # tokens before and after a divergence
SHOWN = 8  # divergences of one check shown on a page
TEXTS = ("expected_text", "got_text")
TOP = ("id", "token", "logprob")
LONGEST = 64  # rows of a list shown on a page
OPEN = {Status.FAILED, Status.ERROR, Status.INCONCLUSIVE}
_ITEM_ORDER = (ItemStatus.FAILED, ItemStatus.UNPROVEN, ItemStatus.WAIVED, ItemStatus.PROVEN)


@dataclass(frozen=True)
class Table:
    """Rows of text under column heads."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    here: int = -1  # the row to mark: where two texts first part


@dataclass(frozen=True)
class PartedTexts:
    """Two texts that begin alike, and how each goes on."""

    common: str
    expected: str
    got: str


@dataclass(frozen=True)
class Facts:
    """The detail of a check's evidence: short facts as (name, text), lists as tables, texts that part."""

    facts: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]
    texts: tuple[PartedTexts, ...] = ()


@dataclass(frozen=True)
class Figure:
    """One bounded metric; `share` maps log10(value / bound) to 0..1, with the bound at one half."""

    check: str
    where: str
    name: str
    value: float | None
    bound: float
    relation: str
    holds: bool
    share: float


def group(cell: Cell) -> str:
    """The column a cell belongs to: its model, engine and device."""
    return f"{cell.model} · {cell.engine} · {cell.device}"


def groups(verdict: Verdict) -> list[str]:
    """All columns in order, including those of cells that reported nothing."""
    cells = [c.cell for c in verdict.cells] + [r.cell for r in verdict.checks]
    return sorted({group(cell) for cell in cells})


def items(verdict: Verdict) -> list[ItemResult]:
    """Checklist items: failed before unproven before waived before proven, then by severity."""
    return sorted(
        verdict.items, key=lambda i: (_ITEM_ORDER.index(i.status), i.severity.rank, i.checklist, i.id)
    )


def matrix_row(item: ItemResult, verdict: Verdict) -> dict[str, str]:
    """column -> worst status of the item there; columns that the item does not concern are absent."""
    columns = {c.cell.id: group(c.cell) for c in verdict.cells}
    columns |= {r.cell.id: group(r.cell) for r in verdict.checks}
    row: dict[str, str] = {}
    for cell, status in item.cells.items():
        column = columns.get(cell, cell)
        row[column] = min(row.get(column, status), status, key=badness)
    return row


class _ByCheck:
    """The items of one verdict by the checks that prove them: a report asks for those of every check."""

    def __init__(self, verdict: Verdict) -> None:
        self.of, self.found = verdict.items, dict[str, list[ItemResult]]()
        for item in verdict.items:
            for check in dict.fromkeys(item.checks):
                self.found.setdefault(check, []).append(item)


_last: list[_ByCheck] = []


def proven_by(result: CheckResult, verdict: Verdict) -> list[ItemResult]:
    """The items that a check proves in its cell, in the order of the verdict."""
    if not _last or _last[0].of is not verdict.items:
        _last[:] = [_ByCheck(verdict)]
    return [item for item in _last[0].found.get(result.base, ()) if result.cell.id in item.cells]


def severity(result: CheckResult, verdict: Verdict) -> Severity:
    """The worst severity of the items that the check proves in its cell; LOW if it proves none."""
    ranked = [item.severity for item in proven_by(result, verdict)]
    return min(ranked, key=lambda s: s.rank, default=Severity.LOW)


def open_checks(verdict: Verdict) -> list[CheckResult]:
    """Checks that failed, had an error or saw nothing: worst severity first, failures before the rest."""
    found = [r for r in verdict.checks if r.status in OPEN and not r.lacking]
    return sorted(found, key=lambda r: (severity(r, verdict).rank, badness(r.status), r.cell, r.check))


def lacking_checks(verdict: Verdict) -> list[CheckResult]:
    """Checks whose engine lacks what they need, by leave of the policy."""
    return sorted((r for r in verdict.checks if r.lacking), key=lambda r: (r.check, r.cell))


def quiet_checks(verdict: Verdict) -> list[CheckResult]:
    """All other checks, in the order of cells and checks."""
    return sorted((r for r in verdict.checks if r.status not in OPEN), key=lambda r: (r.cell, r.check))


def every_check(verdict: Verdict) -> list[CheckResult]:
    """All checks, those that did not pass first."""
    return [*open_checks(verdict), *lacking_checks(verdict), *quiet_checks(verdict)]


def standing(found: StandingResult) -> str:
    """How often a check fails, and since when, in words."""
    told = f"{found.failed} of {found.runs} runs on these digests failed"
    told += f": flaky, {100 * found.flake_rate:.0f} %" if found.flaky else ""
    if found.failing_since:
        runs = "run" if found.failing_runs == 1 else "runs"
        told += f"; failing since {found.failing_since}, {found.failing_runs} {runs} in a row"
    return told


def unsolved(verdict: Verdict) -> list[IncidentResult]:
    """Incidents that are not closed, the first due first."""
    found = [i for i in verdict.incidents if i.state is not IncidentState.CLOSED]
    return sorted(found, key=lambda i: (i.severity.rank, i.opened, i.id))


def waivers(verdict: Verdict) -> list[WaiverResult]:
    """Waivers, the first to expire on top."""
    return sorted(verdict.waivers, key=lambda w: (w.days_left, w.id))


def figures(verdict: Verdict) -> list[Figure]:
    """Every bounded metric, those out of bound first, then by how close they come to it."""
    found = []
    for result in verdict.checks:
        for metric in result.metrics:
            limit = metric.get("bound")
            if not isinstance(limit, int | float):
                continue
            raw = metric.get("value")
            value = float(raw) if isinstance(raw, int | float) and math.isfinite(raw) else None
            relation = str(metric.get("relation", "<="))
            holds = value is not None and {
                "<=": value <= limit, ">=": value >= limit, "==": value == limit,
            }[relation]  # fmt: skip
            name = str(metric.get("name", ""))
            share = _share(value, limit, relation)
            found.append(Figure(result.check, group(result.cell), name, value, limit, relation, holds, share))
    return sorted(found, key=lambda f: (f.holds, -f.share, f.where, f.check, f.name))


def _share(value: float | None, limit: float, relation: str) -> float:
    """0 at a ten-thousandth of the bound, 0.5 at the bound, 1 at ten thousand times it.

    A figure that must be at least its bound is an agreement, a share of one: its distance from one counts.
    """
    if value is None:
        return 1.0
    ratio = (value, limit) if relation != ">=" else (1 - value, 1 - limit)
    if ratio[0] <= 0:
        return 0.0
    if ratio[1] <= 0:
        return 1.0
    return min(max((math.log10(ratio[0] / ratio[1]) + 4) / 8, 0.0), 1.0)


def attempts(result: CheckResult) -> list[AttemptResult]:
    """Every run of a check that was run more than once, in order; none where there was only one."""
    return sorted(result.attempts, key=lambda each: each.attempt)


def finding(detail: Mapping[str, object]) -> Facts:
    """The detail of a check's evidence, whatever its keys are: scalars as facts, lists as tables.

    Two lists of ids under `expected` and `got` become one table of the tokens around their first difference;
    lists of best tokens get column heads.
    """
    facts: list[tuple[str, str]] = []
    tables: list[Table] = []
    texts: list[PartedTexts] = []
    parted, said = _parted(detail), _texts(detail)
    if parted is not None:
        tables.append(parted)
        detail = {name: value for name, value in detail.items() if name not in ("expected", "got")}
    if said is not None:
        texts.append(said)
        detail = {name: value for name, value in detail.items() if name not in TEXTS}
    for name, value in detail.items():
        if isinstance(value, Mapping):
            inner = finding(value)
            if len(inner.facts) > FEW:
                tables.append(Table(_words(name), ("what", "value"), inner.facts[:LONGEST]))
            elif inner.facts:
                facts.append((_words(name), ", ".join(f"{n} {v}" for n, v in inner.facts)))
            tables += [replace(t, name=f"{_words(name)}: {t.name}") for t in inner.tables]
        elif name == curves.DETAIL_KEY and (known := list(curves.read(value))):
            tables.append(_readings(known))
        elif _is_list(value) and all(isinstance(v, Mapping) and _parted(v) is not None for v in value):
            for number, one in enumerate(value[:SHOWN], 1):
                inner = finding(one if isinstance(one, Mapping) else {})
                mark = f"{number}: " if len(value) > 1 else ""
                facts += [(f"{mark}{n}", v) for n, v in inner.facts]
                tables += [replace(t, name=f"{mark}{t.name}") for t in inner.tables]
                texts += inner.texts
        elif _is_list(value) and isinstance(value[0], Mapping | list | tuple):
            table = _table(_words(name), value)
            heads = TOP if name.endswith("_top") and len(table.columns) == len(TOP) else table.columns
            tables.append(replace(table, columns=heads))
        elif isinstance(value, list | tuple):
            facts.append((_words(name), ", ".join(map(_cell, value[:LONGEST])) or "none"))
        else:
            facts.append((_words(name), _cell(value)))
    return Facts(tuple(facts), tuple(tables), tuple(texts))


def kept(result: CheckResult) -> Facts:
    """The finding of a check without what its sentence already says."""
    found = finding(result.detail)
    said = one_line(result.sentence)
    return replace(found, facts=tuple(fact for fact in found.facts if fact[1] != said))


def pictures(result: CheckResult, frame: Frame) -> list[tuple[str, Picture]]:
    """(path of the probe, picture) of every curve in a check's detail."""
    kept = curves.recalled(result.detail)
    return [(path, drawn(curve, frame)) for path, found in kept.items() for curve in found]


def _readings(known: Sequence[curves.Curve]) -> Table:
    heads = ("series", "verdict", "rise", "per call", "95 % interval", "windows that grew")
    rows = [
        (
            _words(c.series),
            c.verdict.value,
            amount(c.values[-1], c.unit),
            amount(c.slope, c.unit),
            f"{amount(c.low, c.unit)} to {amount(c.high, c.unit)}",
            f"{c.windows} of {c.of}",
        )
        for c in known[:LONGEST]
    ]
    return Table("readings", heads, tuple(rows))


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, list | tuple) and bool(value)


def _parted(detail: Mapping[str, object]) -> Table | None:
    """Expected and actual ids side by side, AROUND of them before and after the first that differs.

    `position` in the detail, if any, is the index of the first difference in the whole text.
    """
    expected, got = detail.get("expected"), detail.get("got")
    if not (_is_list(expected) and _is_list(got)):
        return None
    length = max(len(expected), len(got))
    pairs = [(_at(expected, n), _at(got, n)) for n in range(length)]
    first = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
    if first is None:
        return None
    position = detail.get("position")
    start = position - first if isinstance(position, int) else 0
    shown = range(max(0, first - AROUND), min(length, first + AROUND + 1))
    rows = tuple((str(start + n), *pairs[n]) for n in shown)
    return Table(
        "tokens around the first divergence", ("position", "expected", "got"), rows, first - shown[0]
    )


def _texts(detail: Mapping[str, object]) -> PartedTexts | None:
    """The texts around a divergence, parted where they first differ; None if there are none."""
    expected, got = (detail.get(name) for name in TEXTS)
    if not (isinstance(expected, str) and isinstance(got, str)) or expected == got:
        return None
    pairs = enumerate(zip(expected, got, strict=False))
    alike = next((n for n, (a, b) in pairs if a != b), min(len(expected), len(got)))
    return PartedTexts(expected[:alike], expected[alike:], got[alike:])


def _at(ids: Sequence[object], number: int) -> str:
    return _cell(ids[number]) if number < len(ids) else "nothing"


def _table(name: str, rows: Iterable[object]) -> Table:
    """Mappings become columns by key, sequences columns by number."""
    kept = list(rows)[:LONGEST]
    if all(isinstance(row, Mapping) for row in kept):
        keys = list(dict.fromkeys(key for row in kept if isinstance(row, Mapping) for key in row))
        cells = [tuple(_cell(row.get(k, "")) for k in keys) for row in kept if isinstance(row, Mapping)]
        return Table(name, tuple(map(_words, keys)), tuple(cells))
    lists = [tuple(map(_cell, r)) if isinstance(r, list | tuple) else (_cell(r),) for r in kept]
    width = max(map(len, lists))
    padded = tuple(row + ("",) * (width - len(row)) for row in lists)
    return Table(name, tuple(map(str, range(1, width + 1))), padded)


def _cell(value: object) -> str:
    if isinstance(value, str):
        line = one_line(value)
        return line if line == line.strip() and line else f"“{line}”"
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(k)} {_cell(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    return str(value) if isinstance(value, bool) else figure(value)


def _words(name: object) -> str:
    return one_line(str(name)).replace("_", " ")
