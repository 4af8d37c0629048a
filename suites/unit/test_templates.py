"""A template's items are asked of every architecture by its features, and none of them can be lost."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prill_harness.decide.checklist import UNKNOWN, Checklist, Observed, evaluate, load_checklists
from prill_harness.decide.entries import examine, examine_waivers
from prill_harness.decide.templates import instances
from prill_harness.decide.waivers import Conditions
from prill_harness.engines.features import Traits, packaged, traits
from prill_harness.plan.policy import load_policy
from prill_harness.records.catalog import packaged as suites
from prill_harness.records.evidence import Cell, CellStarted, Record, Status
from prill_harness.records.verdict import ItemStatus, Severity
from prill_runtime.errors import PolicyError, WaiverError

from .commandline import invoke
from .test_gate import CELLS, CHECKS, FAILURE, checklist, decide, item, record, started, waiver, whole

BEFORE = {
    "oracle": ("critical", "witness.logits"),
    "read": ("critical", "witness.sensitivity"),
    "noise": ("critical", "witness.floors"),
    "tokens.prompt_ids": ("critical", "tokens.prompt_ids"),
    "tokens.configuration": ("high", "tokens.config"),
    "tokens.exact": ("critical", "tokens.teacher_forced"),
    "tokens.late": ("critical", "tokens.late_positions", "stages.late"),
    "tokens.greedy": ("critical", "tokens.greedy"),
    "tokens.sampled": ("high", "tokens.sampled"),
    "tokens.current": ("critical", "tokens.golden_is_current"),
    "stages": ("critical", "stages.early", "stages.complete"),
    "stages.untouched": ("high", "stages.untouched"),
    "prefill_decode": ("critical", "properties.prefill_decode", "properties.chunking"),
    "batch": ("critical", "properties.batch"),
    "switching": ("high", "properties.switching"),
    "positions": ("critical", "properties.position_offset"),
    "reproducible": ("high", "properties.same_seed"),
    "logprobs": ("medium", "properties.logprobs"),
    "ends": ("high", "properties.end_of_text", "properties.max_tokens", "properties.stop_strings",
             "properties.cancel"),
    "requests": ("high", "requests.features", "requests.logprobs", "requests.stops"),
}  # fmt: skip
"""What llama.toml and gpt.toml asked of their architectures: severity and checks of every item, by hand."""
OTHERWISE = {"tokens.configuration": "tokens.configuration.unturned", "positions": "positions.learned"}
"""Items of models without rope, which give another reason."""
TEMPLATE = checklist(
    item("exact", "tokens.exact"),
    msgspec.structs.replace(item("turned", "tokens.greedy"), needs=("rope",)),
    msgspec.structs.replace(item("learned", "tokens.greedy"), lacks=("rope",)),
    template=True,
)
LLAMA, GPT = "gqa,rope", "learned_positions"


def run(features: dict[str, str | None], records: list[Record]) -> list[Record]:
    """The records with these features of models; None: nobody knows them."""
    told = {model: {} if names is None else {"features": names} for model, names in features.items()}
    return [
        msgspec.structs.replace(r, versions=r.versions | told[r.cell.model])
        if isinstance(r, CellStarted) else r
        for r in records
    ]  # fmt: skip


def model_list() -> Checklist:
    return load_checklists(["model"])[0]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_was_asked_of_an_architecture_is_asked(architecture: str) -> None:
    """Every item with the severity and the checks that the architecture's own file had, and no other."""
    (mine,) = [each for each in instances([model_list()], packaged()) if each.id == architecture]
    found = {i.id: (i.severity.value, *i.checks) for i in mine.items}
    named = {OTHERWISE.get(name, name) if architecture == "gpt2" else name: asked
             for name, asked in BEFORE.items()}  # fmt: skip
    assert found == {f"{architecture}.{name}": asked for name, asked in named.items()}
    assert sum(mine.left_out.values()) == 4


def test_the_default_gate_asks_it_of_every_architecture_of_its_plan() -> None:
    """Each model of the plan is one of an architecture whose whole list the gate asks for."""
    gate = load_policy(suites() / "gates.toml").gate()
    assert gate.checklists == ("foundation", "model")
    models = {model: traits(model) for entry in gate.plan for model in entry.models}
    lists = instances(load_checklists(gate.checklists), models)
    assert [each.id for each in lists] == ["foundation", "llama", "gpt2", "gpt-oss"]
    for each in lists[1:]:
        assert {c for i in each.items for c in i.checks} == {
            c for asked in BEFORE.values() for c in asked[1:]
        }


def test_an_architecture_that_nobody_heard_of_has_its_items() -> None:
    """No file of its own: its name in front of the template's ids, chosen by what its models have."""
    mine = Traits("nobodys", frozenset({"rms_norm", "learned_positions"}))
    (found,) = instances([model_list()], {"m.gguf": mine})
    assert found.id == "nobodys"
    assert {i.id for i in found.items} == {f"nobodys.{OTHERWISE.get(name, name)}" for name in BEFORE}
    assert found.left_out == {
        "with rope": 1,
        "with rope and without temperature and without longrope": 1,
        "with temperature": 1,
        "with longrope": 1,
    }


def test_every_model_owes_every_check() -> None:
    """With rope or with learned positions, whatever else it has: no check of the template is left out."""
    asked = {check for i in model_list().items for check in i.checks}
    for feature in ("rope", "learned_positions"):
        (found,) = instances([model_list()], {"m": Traits("x", frozenset({feature}))})
        assert {check for i in found.items for check in i.checks} == asked


def test_an_item_speaks_of_its_architecture_alone() -> None:
    """A failure on Llama is no failure of GPT's item, and each owes what its features ask."""
    found = decide(run({"llama": LLAMA, "gpt": GPT}, whole(FAILURE)), lists=TEMPLATE)
    assert {i.id: i.status.value for i in found.items} == {
        "llama.exact": "failed", "llama.turned": "proven", "gpt2.exact": "proven", "gpt2.learned": "proven",
    }  # fmt: skip
    by_id = {i.id: i for i in found.items}
    assert set(by_id["gpt2.exact"].cells) == {"gpt/numpy/tokens/cpu"}
    assert (by_id["gpt2.exact"].checklist, by_id["llama.exact"].line) == ("gpt2", 1)


def test_of_two_models_only_those_with_the_feature_owe_it() -> None:
    """One architecture, one model with rope and one without: each owes its own item, by its own cell."""
    cells = (CELLS[0], Cell("other", "numpy", "tokens"))
    records = [
        msgspec.structs.replace(r, versions=r.versions | {"architecture": "llama"})
        if isinstance(r, CellStarted) else r
        for r in whole(cells=cells)
    ]  # fmt: skip
    found = decide(run({"llama": LLAMA, "other": ""}, records), lists=TEMPLATE, cells=cells)
    cells_of = {i.id: set(i.cells) for i in found.items}
    assert cells_of["llama.turned"] == {"llama/numpy/tokens/cpu"}
    assert cells_of["llama.learned"] == {"other/numpy/tokens/cpu"}
    assert len(cells_of["llama.exact"]) == 2


def test_a_model_of_the_plan_that_left_nothing_hides_no_item() -> None:
    """Nobody knows its architecture: all items of the template stand there, unproven, and hold the gate."""
    alone = run({"llama": LLAMA}, whole(cells=CELLS[:1]))
    found = decide(alone, lists=TEMPLATE)
    lost = {i.id: i.status for i in found.items if i.id.startswith(UNKNOWN)}
    assert lost == {f"{UNKNOWN}.{i.id}": ItemStatus.UNPROVEN for i in TEMPLATE.items}
    assert found.exit_code == 10
    assert found.rules[0].id == "items"
    assert found.rules[0].status is Status.INCONCLUSIVE


def test_a_cell_that_knows_nothing_makes_no_model_unknown() -> None:
    """A suite that did not load records no versions: what the model's other cells recorded stands."""
    broken = Cell("llama", "numpy", "unloaded")
    records = [*run({"llama": LLAMA}, whole(cells=CELLS[:1])), CellStarted(broken, ("unloaded.x",), 0.0)]
    found = decide(records, lists=TEMPLATE, cells=(*CELLS[:1], broken))
    assert [i.id for i in found.items] == ["llama.exact", "llama.turned"]
    assert found.exit_code == 10


def test_what_a_model_has_may_be_unknown() -> None:
    """Of a model that nobody described every item stands there; a pass proves none that asks a feature."""
    found = decide(run({"llama": LLAMA, "gpt": None}, whole()), lists=TEMPLATE)
    mine = {i.id: i for i in found.items if i.id.startswith("gpt2.")}
    assert {name: i.status.value for name, i in mine.items()} == {
        "gpt2.exact": "proven", "gpt2.turned": "unproven", "gpt2.learned": "unproven",
    }  # fmt: skip
    assert "what the model has is not known" in mine["gpt2.turned"].sentence
    assert found.exit_code == 10


def test_a_ledger_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The items are decided by what the cells recorded; no model file is opened."""
    monkeypatch.setattr("prill_runtime.gguf.file.GGUFFile.__init__", None)
    found = decide(run({"llama": LLAMA, "gpt": GPT}, whole()), lists=TEMPLATE)
    assert (found.exit_code, len(found.items)) == (0, 4)


@pytest.mark.parametrize("known", [Traits("x", frozenset({"rope", "gqa"})), Traits("x", frozenset()),
                                   Traits("x"), Traits()])  # fmt: skip
def test_a_ledger_keeps_what_is_known(known: Traits) -> None:
    """No features, unknown features and an unknown architecture stay what they are."""
    assert Traits.of_record(known.recorded) == known


def test_an_item_of_no_cell_is_never_proven() -> None:
    """Neither of an architecture without a cell in the plan, nor beside evidence of another's."""
    stray = msgspec.structs.replace(item("nobodys.exact", "tokens.exact"), architecture="nobodys")
    evidence = {CELLS[0].id: {"tokens.exact": record(CELLS[0], "tokens.exact")}}
    seen = Observed(evidence, {}, {"llama": Traits("llama", frozenset())})
    for cells in (CELLS[:1], ()):
        (found,) = evaluate([checklist(stray)], cells, seen, dt.date(2026, 6, 1))
        assert found.status is ItemStatus.UNPROVEN
        assert found.cells == {}


FEATURES = st.sampled_from([None, "", "rope", "rope,gqa", "learned_positions"])
STATUSES = st.sampled_from([Status.PASSED, Status.PASSED, Status.FAILED, Status.INCONCLUSIVE])


@settings(max_examples=150, deadline=None)
@given(st.tuples(FEATURES, FEATURES), st.lists(STATUSES, min_size=4, max_size=4), st.sets(st.integers(0, 1)))
def test_green_leaves_no_critical_item_unproven(
    features: tuple[str | None, str | None], statuses: list[Status], unstarted: set[int]
) -> None:
    """Whatever models have, did and left behind: each is asked every item that it may owe, and a green gate
    has proven all of them."""
    keys = [(cell.model, check) for cell in CELLS for check in CHECKS]
    records = whole({k: (status, "seen") for k, status in zip(keys, statuses, strict=True)})
    lost = {CELLS[number] for number in unstarted}
    records = [r for r in records if not (isinstance(r, CellStarted) and r.cell in lost)]
    found = decide(run(dict(zip(("llama", "gpt"), features, strict=True)), records), lists=TEMPLATE)
    listed = {i.id for i in found.items}
    for number, (cell, has) in enumerate(zip(CELLS, features, strict=True)):
        name = UNKNOWN if number in unstarted else started(cell).versions["architecture"]
        unknown = has is None or number in unstarted
        assert f"{name}.exact" in listed
        assert not unknown or {f"{name}.turned", f"{name}.learned"} <= listed
        assert unknown or f"{name}.{'turned' if 'rope' in str(has) else 'learned'}" in listed
    if found.exit_code == 0:
        assert all(i.status is ItemStatus.PROVEN for i in found.items if i.severity is Severity.CRITICAL)
        assert None not in features
        assert not unstarted


# --- names in files ---------------------------------------------------------------------------------------


def policy(folder: Path, item: str, lists: str = "model") -> Path:
    path = folder / "gates.toml"
    path.write_text(
        f'default = "g"\n[gates.g]\nchecklists = ["{lists}"]\nnever_waive = ["{item}"]\n'
        '[[gates.g.plan]]\nmodels = ["fixture:llama-tiny"]\nengines = ["numpy"]\nsuites = ["tokens"]\n'
    )
    return path


@pytest.mark.parametrize("name", ["llama.tokens.exact", "gpt2.tokens.exact", "gpt2.positions.learned"])
def test_a_never_list_names_items_of_any_described_architecture(name: str, tmp_path: Path) -> None:
    """An architecture's items are known before any model was opened."""
    examine(load_policy(policy(tmp_path, name)))


@pytest.mark.parametrize("name", ["llama.tokens.exakt", "tokens.exact", "lama.tokens.exact"])
def test_an_unknown_item_is_told_with_the_nearest(name: str, tmp_path: Path) -> None:
    """A misspelt item, the template's own id and a misspelt architecture are none, and which is, is said."""
    with pytest.raises(PolicyError, match=r"did you mean '[a-z0-9-]+\.tokens\.exact'\?"):
        examine(load_policy(policy(tmp_path, name)))
    with pytest.raises(WaiverError, match=r"did you mean '[a-z0-9-]+\.tokens\.exact'\?"):
        examine_waivers([waiver(item=name, check="tokens.teacher_forced")], Path("w.toml"))


def test_a_waiver_speaks_of_an_architecture() -> None:
    """Its checks are those of the template's item, and no others."""
    sound = waiver(
        item="gpt2.tokens.exact", check="tokens.teacher_forced",
        conditions=Conditions("numpy", "cpu", "fixture:gpt2-tiny"),
    )  # fmt: skip
    examine_waivers([sound], Path("w.toml"))
    with pytest.raises(WaiverError, match="does not count"):
        examine_waivers([msgspec.structs.replace(sound, check="tokens.greedy")], Path("w.toml"))


def test_a_policy_of_before_is_told_the_new_name(tmp_path: Path) -> None:
    """The lists that were one for each architecture are one."""
    with pytest.raises(PolicyError, match="every architecture's is made of `model`"):
        examine(load_policy(policy(tmp_path, "llama.oracle", "llama")))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_architectures_list_is_shown_by_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`prill checklist gpt2` shows its items alone, and says how many its models do not owe."""
    monkeypatch.chdir(tmp_path)  # where nothing was run
    result = invoke("checklist", name)
    assert result.exit_code == 10
    assert f"## {name}: 0 of {len(BEFORE)} proven" in result.stdout
    assert result.stdout.count("\n## ") == 1
    assert f"{name}: left out what none of its models owes" in result.stderr
