"""The commands that look into what a gate left: reports of every format, badge, show and diff."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from lxml import etree

from prill_harness.commands.ledgers.parting import marked
from prill_harness.commands.shared import reporters
from prill_harness.commands.shared.verdicts import decided
from prill_harness.records.evidence import Status
from prill_harness.records.verdict import CheckResult

from .commandline import emitted, invoke
from .sample import VERDICT, laid


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return laid(tmp_path_factory.mktemp("judged"))


@pytest.mark.parametrize("form", sorted(reporters.installed()))
def test_report_prints_what_the_format_renders(judged: Path, form: str) -> None:
    """Of every installed format, by its name."""
    result = invoke("report", "--ledger", str(judged), "--format", form)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == reporters.render(form, decided(judged), reporters.beside(judged.parent))


def test_badge_draws_the_verdict(judged: Path, tmp_path: Path) -> None:
    """A picture on stdout, an endpoint into a file; both say that the gate failed and by which rule."""
    drawn = etree.fromstring(invoke("badge", "--ledger", str(judged)).stdout.encode())
    assert drawn.get("aria-label") == "prill architectures: failed: critical-items"
    target = tmp_path / "badge.json"
    result = invoke("badge", "--ledger", str(judged), "--shields", "-o", str(target))
    assert (result.exit_code, result.stdout) == (0, "")
    assert json.loads(target.read_text())["message"] == "failed: critical-items"


def test_badge_refuses_what_was_altered(judged: Path, tmp_path: Path) -> None:
    """A verdict turned green by hand is no badge but exit 4, in one sentence."""
    altered = (
        (judged.with_name("verdict.json")).read_text().replace('"status":"failed"', '"status":"passed"', 1)
    )
    (tmp_path / "verdict.json").write_text(altered)
    result = invoke("badge", "--ledger", str(judged), "--verdict", str(tmp_path / "verdict.json"))
    assert (result.exit_code, result.stdout) == (4, "")
    assert "the verdict was altered after the gate wrote it" in result.stderr
    assert invoke("badge", "--ledger", str(tmp_path / "nosuch.jsonl")).exit_code == 4


# --- show -----------------------------------------------------------------------------------------------


def test_show_opens_the_failing_case(judged: Path) -> None:
    """Sentence, both texts with the difference marked, the tokens around it, both sides' best, command."""
    result = invoke("show", "tokens.greedy", "--ledger", str(judged))
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "failed  tokens.greedy  fixture:llama-tiny/numpy/tokens/cpu"
    assert lines[1].startswith("prompt 2 parts from the golden at token 181")
    text, other = (next(ln for ln in lines if ln.startswith(f"  {word} ")) for word in ("expected", "got"))
    at = lines[lines.index(other) + 1].index("^")
    assert (text[:at].split()[1:], text[at:], other[at:]) == (["kept", "d"], "er\\n", "ie\\n")
    (row,) = (line.split() for line in lines if line.rstrip().endswith("<"))
    assert row == ["181", "311", "77", "<"]
    ranks = [line.split() for line in lines if line[:1] in "12" and '"' in line]
    assert ranks[0] == ["1", "311", '"', 'der"', "-0.2", "77", '"', 'die"', "-0.3"]
    assert lines[-2].startswith(
        "reproduce: prill run --engine numpy --model fixture:llama-tiny tokens.greedy"
    )
    assert lines[-1] == "also passed in fixture:gpt2-tiny/numpy/tokens/cpu: tokens.greedy"


def test_show_takes_the_worst_and_then_the_cell_that_is_asked_for(judged: Path) -> None:
    """Without --cell the cell where it is worst; with it that one alone; JSON holds the whole record."""
    result = invoke("show", "tokens.greedy", "--ledger", str(judged), "--cell", "gpt2", "--json")
    found = emitted(result.stdout)
    (shown,) = found["shown"]
    assert shown["evidence"]["cell"]["model"] == "fixture:gpt2-tiny"
    assert found["others"] == shown["attempts"] == []
    everywhere = invoke("show", "tokens.greedy", "--ledger", str(judged), "--all").stdout
    assert "\nalso " not in everywhere
    assert everywhere.count("reproduce: ") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tokens.gredy"], "tokens.greedy"),
        (["tokens.greedy", "--cell", "phi"], "no such cell"),
        (["tokens.greedy", "--ledger", "nosuch.jsonl"], "no such ledger"),
    ],
)
def test_show_names_what_is_not_there(judged: Path, words: list[str], said: str) -> None:
    """A check, a cell or a ledger that is not there is exit 4, with the nearest right word."""
    result = invoke("show", "--ledger", str(judged), *words)
    assert (result.exit_code, result.stdout) == (4, "")
    assert said in result.stderr


def test_the_caret_stands_below_the_first_character_that_differs() -> None:
    """Also far into a long text, and below escapes, which take several columns."""
    for shared, left, right in [
        ("", "a", "b"),
        ("x" * 500, "a", "b"),
        ("\n\t\x1b", "ab", ""),
        ("€" * 70, "", "b"),
    ]:
        first, second, caret = marked(shared + left, shared + right)
        at = caret.index("^")
        assert first[10:at] == second[10:at]
        assert first[at : at + 1] != second[at : at + 1]
    assert [*marked("same", "same")][2].endswith("^ the same")


# --- diff -----------------------------------------------------------------------------------------------


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the sample's ledger with some checks replaced or left out."""

    def write(change: Callable[[CheckResult], CheckResult | None]) -> Path:
        checks = (new for check in VERDICT.checks if (new := change(check)) is not None)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        laid(folder, msgspec.structs.replace(VERDICT, checks=tuple(checks)))
        return folder

    return write


def only(name: str, **changes: object) -> Callable[[CheckResult], CheckResult | None]:
    """Change the check of this name in the first model; without changes, leave it out."""

    def change(check: CheckResult) -> CheckResult | None:
        if check.check != name or "llama" not in check.cell.model:
            return check
        return msgspec.structs.replace(check, **changes) if changes else None

    return change


def test_diff_of_a_ledger_with_itself_is_empty(judged: Path) -> None:
    """Nothing changed: exit 0, and every check is counted as the same."""
    result = invoke("diff", str(judged), str(judged))
    assert (result.exit_code, result.stdout) == (0, f"{len(VERDICT.checks)} the same, 0 figures changed\n")


@pytest.mark.parametrize(
    ("change", "kind", "code"),
    [
        (only("tokens.prompt_ids", status=Status.INCONCLUSIVE), "worse", 1),
        (only("tokens.greedy", status=Status.PASSED), "better", 0),
        (only("tokens.greedy", sentence="parts at token 3"), "other", 0),
        (only("tokens.prompt_ids", observed=1), "less", 1),
        (only("tokens.prompt_ids", observed=10_000), None, 0),
        (only("tokens.greedy"), "gone", 1),
    ],
)
def test_diff_tells_each_kind_of_change(
    judged: Path, changed: Callable[..., Path], change: object, kind: str | None, code: int
) -> None:
    """One change is found, by its kind, and fails only when something is worse, gone or compares less."""
    result = invoke("diff", str(judged.parent), str(changed(change)), "--json")
    found = emitted(result.stdout)
    assert result.exit_code == code
    assert [each["kind"] for each in found["changes"]] == ([kind] if kind else [])
    assert found["same"] == len(VERDICT.checks) - bool(kind)


def test_diff_the_other_way_round_is_new(judged: Path, changed: Callable[..., Path]) -> None:
    """What came is new, which is no failure; the table tells check, cell and both statuses."""
    result = invoke("diff", str(changed(only("tokens.greedy"))), str(judged))
    assert result.exit_code == 0
    (row,) = (line.split() for line in result.stdout.splitlines() if line.startswith("new"))
    assert row[:5] == ["new", "-", "failed", "tokens.greedy", "fixture:llama-tiny/numpy/tokens/cpu"]
    assert result.stdout.splitlines()[-1].startswith("1 new, ")
    assert invoke("diff", str(judged), "nosuch").exit_code == 4


def test_diff_shows_figures_that_moved(judged: Path, changed: Callable[..., Path]) -> None:
    """A figure that is another is counted, and with --figures shown, before and after, beside its bound."""
    metrics = ({"name": "kl_max", "value": 0.5, "bound": 0.002, "relation": "<="},)
    other = changed(only("tokens.teacher_forced", metrics=metrics))
    result = invoke("diff", str(judged), str(other), "--figures")
    assert result.exit_code == 0
    (row,) = (line.split() for line in result.stdout.splitlines() if "kl_max" in line)
    assert row == [
        "tokens.teacher_forced",
        "fixture:llama-tiny/numpy/tokens/cpu",
        "kl_max",
        "0.087",
        "0.5",
        "0.002",
    ]
    assert result.stdout.splitlines()[-1].endswith("1 figures changed")
