"""Where something is judged, no largest or smallest value is taken in a way that may drop a NaN.

`max(worst, nan)` is `worst`: what is not a number is forgotten, and the bound holds. `max(nan, 0.0)` is NaN:
it goes by the order. `compare.largest` and `compare.smallest` keep it in any place.
"""

from __future__ import annotations

import ast
import itertools
import math
from pathlib import Path

import pytest

from prill_harness.faults.catalogue import modules
from prill_harness.numbers.compare import largest, smallest

ROOT = Path(__file__).parents[2]
ROOMS = ("harness/prill_harness", "suites/prill_suites", "reports/prill_reports")
WHOLE = {"ceil", "floor", "flatnonzero", "argmax", "argmin", "frexp", "isqrt"}  # calls that give no float
DROPPING = {"nanmax", "nanmin", "nansum", "nanmean", "fmax", "fmin", "nan_to_num"}
# The first two explain what has been found wrong, the third draws it; the faults are wrong on purpose.
EXPLAINING = ("/hypotheses/", "/localise.py", "prill_reports/view.py")
PLANTED = tuple(f"/{module.replace('.', '/')}.py" for module in modules())


def _may_be_a_float(node: ast.expr) -> bool:
    """By its look: a float literal, or a call that gives floats, anywhere in it."""
    for each in ast.walk(node):
        if isinstance(each, ast.Constant) and isinstance(each.value, float):
            return True
        if isinstance(each, ast.Call):
            function = each.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            module = getattr(getattr(function, "value", None), "id", "")
            if name in WHOLE or name == "int":
                return False
            if name in ("float", "abs") or module in ("np", "math"):
                return True
    return False


def _folds(node: ast.AST) -> bool:
    """Whether an assignment takes the larger of a name's value and another: `worst = max(worst, …)`."""
    if not isinstance(node, ast.Assign):
        return False
    pairs = [(target, node.value) for target in node.targets]
    for target, value in pairs:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs += zip(target.elts, value.elts, strict=True)
        if _extreme(value) and ast.unparse(target) in {ast.unparse(a) for a in value.args}:  # type: ignore[attr-defined]
            return True
    return False


def _extreme(node: ast.AST) -> bool:
    """Whether it is a call of the built-in `max` or `min` that compares the values themselves."""
    named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("max", "min")
    if named and any(ast.unparse(a).startswith("int(") for a in node.args):  # type: ignore[attr-defined]
        return False  # of integers
    if named and len(node.args) == 2 and isinstance(node.args[1], ast.Constant):  # type: ignore[attr-defined]
        return False  # Python compares the second with the first: a NaN that stands first stays
    return named and not any(k.arg == "key" for k in node.keywords)  # type: ignore[attr-defined]


def dropping(source: str) -> list[str]:
    """What may drop a NaN in a module: the code of each place."""
    found = []
    for node in ast.walk(ast.parse(source)):
        values = [*node.args, *(k.value for k in node.keywords)] if isinstance(node, ast.Call) else []
        by_name = isinstance(node, ast.Attribute) and node.attr in DROPPING
        if _folds(node) or by_name or (_extreme(node) and any(map(_may_be_a_float, values))):
            found.append(f"{node.lineno}: {ast.unparse(node)[:90]}")  # type: ignore[attr-defined]
    return found


def test_no_judging_code_may_drop_what_is_not_a_number() -> None:
    """Every module of harness, suites and reports: extremes of floats go through the helper."""
    modules = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    judging = [path for path in modules if not path.as_posix().endswith(PLANTED)]
    judging = [path for path in judging if not any(part in path.as_posix() for part in EXPLAINING)]
    assert len(judging) > 100
    found = {
        path.relative_to(ROOT).as_posix(): dropping(path.read_text(encoding="utf-8")) for path in judging
    }
    assert {name: places for name, places in found.items() if places} == {}


@pytest.mark.parametrize(
    "line",
    [
        "worst = max(worst, error(x))",
        "low, high = min(low, a), max(high, b)",
        "at['x'] = max(at['x'], y)",
        "x = max(0.0, y)",
        "x = min(float(y), z)",
        "x = max((e.slope for e in y), default=0.0)",
        "x = np.nanmax(y)",
        "if max(a, np.abs(b).max()) > c: pass",
    ],
)
def test_the_lint_sees_it(line: str) -> None:
    """Each way of dropping a NaN that was met here is found."""
    assert dropping(line)


@pytest.mark.parametrize(
    "line",
    [
        "x = max(1, len(y) // 2)",
        "x = min(y / float(z), 500.0)",
        "x = max(y, key=float)",
        "x = largest(x, float(y))",
        "max(map(len, y))",
    ],
)
def test_the_lint_lets_counts_be(line: str) -> None:
    """Counts have no NaN, and a literal that stands second keeps one."""
    assert not dropping(line)
    assert math.isnan(min(math.nan, 500.0))
    assert math.isnan(max(math.nan, 0.0))


@pytest.mark.parametrize("order", list(itertools.permutations((0.0, math.nan, 2.0))))
def test_a_nan_stays_in_any_place(order: tuple[float, ...]) -> None:
    """The extremes of values of which one is not a number are not a number; infinities are ordered."""
    assert math.isnan(largest(*order))
    assert math.isnan(smallest(*order))
    assert largest(-math.inf, 1.0, math.inf) == math.inf
    assert smallest(math.inf, 1.0, -math.inf) == -math.inf
