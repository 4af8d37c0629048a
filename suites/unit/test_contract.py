"""An engine that nobody here wrote is held to the contract: a sound one passes, defects are found by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from prill_harness.engines.embedded import Embedded
from prill_harness.engines.models import resolve_model
from prill_harness.faults.blackbox import changed
from prill_harness.faults.blackbox.answers import ANSWERS
from prill_harness.faults.blackbox.changes import CHANGES
from prill_harness.faults.opening import open_engine
from prill_harness.plan.policy import load_policy
from prill_harness.records.catalog import check_ids, packaged
from prill_harness.run.checks import CheckFailed, Observer
from prill_harness.tokens.golden import Golden, golden_for
from prill_runtime.errors import EngineError, InvalidParameter, MissingCapability, PrillError
from prill_suites import contract_judges as judges
from prill_suites import contract_repeats as repeats
from prill_suites import contract_requests as requests
from prill_suites import contract_sight as sight
from prill_suites.contract_judges import Client, Judge

from .commandline import invoke
from .served import SLOTS, WRONG_AT
from .serving import MODEL, Started, oracle, servers

__all__ = ["oracle", "servers"]

FAMILIES = ("llama-tiny", "gpt2-tiny", "llama-window", "gpt-oss-tiny", "gemma3-tiny", "llama-tiny:q8_0")

MINE = '''
import math
from prill_harness.faults.opening import open_engine


class Mine:
    """A sound engine of three methods and more, and every defect that is switched on."""
    arithmetic, defect, count, at_once = "float32", "", 0, 2

    def __init__(self, model):
        self.engine = open_engine("numpy", model)
        self.config = dict(self.engine.info.config)
        if self.defect == "config":
            self.config["rope_base"] = 10000.0

    def tokenize(self, text, add_special=True):
        if self.defect == "crlf":
            text = text.replace("\\r\\n", "\\n")
        if self.defect == "flag":
            add_special = True
        ids = self.engine.tokenize(text, add_special)
        return [1, *ids] if self.defect == "bos" and add_special else ids

    def detokenize(self, ids):
        text = self.engine.detokenize(ids)
        return text.decode("ascii", "ignore") if self.defect == "ascii" else text

    def generate(self, ids, max_tokens, stop=(), ignore_eos=False, on_token=None, **sampling):
        type(self).count += 1
        if self.defect == "length":
            max_tokens += 1
        if self.defect == "none" and not max_tokens:
            max_tokens = 1
        if self.defect == "stop":
            stop = ()
        if self.defect == "seed" and "seed" in sampling:
            sampling["seed"] = 4
        if self.defect == "random" and "seed" in sampling:
            sampling["seed"] += self.count
        if self.defect == "wrap":
            ids = [token % 1024 for token in ids]
        if self.defect == "cut":
            ids = ids[-1000:]
        if self.defect == "warm" and self.count % 2:
            ids = ids[1:]
        if self.defect == "untold":
            on_token = None
        heard = on_token
        if self.defect == "deaf" and heard is not None:
            on_token = lambda token, logprob: heard(token, logprob) or True
        made = self.engine.generate(
            ids, max_tokens=max_tokens, stop=stop, ignore_eos=ignore_eos, on_token=on_token, **sampling
        )
        out = dict(ids=list(made.ids), logprobs=list(made.logprobs), finish_reason=made.finish_reason,
                   end_id=made.end_id)
        if self.defect == "token" and len(out["ids"]) > 5:
            out["ids"][5] ^= 1
        if self.defect == "reason":
            out["finish_reason"] = "length"
        if self.defect == "base2":
            out["logprobs"] = [value / math.log(2) for value in out["logprobs"]]
        if self.defect == "tempered" and sampling.get("temperature"):
            out["logprobs"] = [value / 3 for value in out["logprobs"]]
        return out

    def close(self):
        self.engine.close()
'''


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("mine") / "contracted.py"
    file.write_text(MINE)
    return f"py:{file}:Mine"


@pytest.fixture(scope="module")
def golden() -> Golden:
    return golden_for(MODEL)


def found(judge: Judge, spec: str, defect: str, golden: Golden, oracle: Embedded) -> str:
    """What a judge says of the class with a defect; empty if nothing."""
    import sys

    with open_engine(spec, MODEL) as engine:
        cls: Any = sys.modules["prill_engine_contracted"].Mine
        cls.defect = defect
        try:
            with open_engine(spec, MODEL) if defect == "config" else engine as asked:
                client = Client(Observer(), asked, golden, oracle)
                judge(client)
                assert client.observe.observed > 0
        except (CheckFailed, EngineError, InvalidParameter) as error:
            return str(error)
        finally:
            cls.defect = ""
    return ""


SOUND = tuple(sight.JUDGES.values())


def test_a_sound_engine_keeps_it(mine: str, golden: Golden, oracle: Embedded) -> None:
    """No judge says anything of a class that does what the file says."""
    said = {judge.__name__: found(judge, mine, "", golden, oracle) for judge in SOUND}
    assert said == {judge.__name__: "" for judge in SOUND}


@pytest.mark.parametrize(
    ("defect", "judge", "says"),
    [
        ("crlf", judges.tokenization, "tokenizer:"),
        ("flag", judges.tokenization, "add_special=False"),
        ("bos", judges.tokenization, "from 1 on"),
        ("ascii", judges.round_trip, "comes back as another text"),
        ("token", judges.choices, "token 5: expected"),
        ("base2", judges.numbers, "its logprobs are off"),
        ("tempered", judges.before_temperature, "at temperature 5"),
        ("config", judges.configuration, "rope_base: the file says 50000.0"),
        ("warm", repeats.repeatable, "the same request gives other logprobs"),
        ("seed", requests.seeds, "all give the same text"),
        ("random", requests.seeds, "seed 1, asked again"),
        ("length", requests.lengths, "asked for 1 tokens, it wrote 2"),
        ("none", requests.lengths, "asked for 0 tokens, it wrote 1"),
        ("stop", requests.stops, "the text ends by length"),
        ("reason", requests.stops, "the text ends by length"),
        ("cut", requests.context, "with 4 positions left: 12 tokens"),
        ("wrap", requests.vocabulary, "id 1024 of 1024: expected a refusal"),
        ("untold", requests.streaming, "told while it was written"),
        ("deaf", requests.cancelled, "cancelled at its third token"),
    ],
)
def test_a_defect_is_found_by_the_check_that_is_about_it(
    defect: str, judge: Judge, says: str, mine: str, golden: Golden, oracle: Embedded
) -> None:
    """Each defect of the class, by the judge whose promise it breaks, in a sentence that says which."""
    assert says in found(judge, mine, defect, golden, oracle)


DEFECTS = {
    "crlf": ("contract.tokenization", "tokenizer: "),
    "always_special": ("contract.tokenization", "add_special=False"),
    "ascii": ("contract.round_trip", "comes back as another text"),
    "token": ("contract.tokens", f"prompt 0, token {WRONG_AT}: expected"),
    "bos_twice": ("contract.logprobs", "its logprobs are off"),
    "log10": ("contract.logprobs", "its logprobs are off"),
    "late_logprobs": ("contract.logprobs", "its logprobs are off"),
    "ids_shifted": ("contract.logprobs", "its logprobs are off"),
    "tempered": ("contract.raw_logprobs", "it is the one behind the temperature"),
    "warm_short": ("contract.repeatable", "the same request gives other logprobs"),
    "mixed": ("contract.beside", "the same request gives another text"),
    "late_lost": ("contract.continued", "the same request gives other logprobs"),
    "seed_ignored": ("contract.seeds", "all give the same text"),
    "seed_drawn": ("contract.seeds", "seed 1, asked again"),
    "one_more": ("contract.lengths", "asked for 1 tokens, it wrote 2"),
    "one_for_none": ("contract.lengths", "asked for 0 tokens, it wrote 1"),
    "past_end": ("contract.end", "is the end of the text, and it went on"),
    "stop_ignored": ("contract.stops", "the text ends by length"),
    "stop_left": ("contract.stops", "the text is not what stands before it"),
    "cut_off": ("contract.context", "expected a refusal"),
    "wraps": ("contract.vocabulary", "id 1024 of 1024: expected a refusal"),
    "error_stays": ("contract.vocabulary", "after id 1024 was refused"),
    "split": ("contract.streaming", "where a character is "),
    "slot_kept": ("contract.cancel", "no slot is free"),
    "config": ("contract.configuration", "vocab_size: the file says 1024, the engine reports 1025"),
}
"""What a server can get wrong: the check that has to find it, and what it says."""


@pytest.fixture(scope="module")
def server(servers: Any) -> Started:
    started: Started = servers("llama")
    return started


@pytest.fixture(scope="module")
def few(golden: Golden) -> Golden:
    """The golden with as few prompts as show every defect: the last has a character of several tokens."""
    return msgspec.structs.replace(golden, prompts=[*golden.prompts[:2], golden.prompts[-1]])


def said_of(server: Started, check: str, golden: Golden, oracle: Embedded, *defects: str) -> str:
    """What a check says of the server with these defects, asked over HTTP."""
    server.switch(" ".join(defects))
    with open_engine(f"{server.url},arithmetic=float32", MODEL) as engine:
        return sight.judged(check, Client(Observer(), engine, golden, oracle))


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_of_a_server_is_found(defect: str, server: Started, few: Golden, oracle: Embedded) -> None:
    """Each defect of a server, by the check that is about it, in a sentence that says which."""
    check, says = DEFECTS[defect]
    assert says in said_of(server, check, few, oracle, defect)
    if defect == "slot_kept":  # what is kept stays kept: the server is of no use any more
        for _ in range(SLOTS):
            server.release()


@pytest.mark.parametrize("check", sight.JUDGES)
def test_a_sound_server_keeps_every_promise(
    check: str, server: Started, few: Golden, oracle: Embedded
) -> None:
    """No check says anything of the same server without a defect."""
    assert said_of(server, check, few, oracle) == ""


@pytest.mark.parametrize(
    ("defect", "lacks"),
    [("no_stop", ["contract.stops"]), ("no_stream", ["contract.streaming", "contract.cancel"])],
)
def test_what_a_server_refuses_is_inconclusive_by_name_and_nothing_else_is(
    defect: str, lacks: list[str], server: Started, few: Golden, oracle: Embedded
) -> None:
    """A server that takes no stop strings, or streams nothing, is asked everything else as before."""
    missing = {}
    for check in ("tokens", "stops", "streaming", "cancel", "lengths"):
        try:
            assert said_of(server, f"contract.{check}", few, oracle, defect) == ""
        except MissingCapability as error:
            missing[f"contract.{check}"] = str(error)
    assert list(missing) == lacks
    assert all(f"{defect.removeprefix('no_')} is not supported" in said for said in missing.values())


def test_arguments_that_a_class_does_not_take_are_missed_by_name(tmp_path: Path) -> None:
    """`generate(ids, max_tokens)` is enough for greedy texts; what it does not take is named when asked."""
    file = tmp_path / "least.py"
    file.write_text(
        "class Least:\n"
        "    def __init__(self, model): pass\n"
        "    def generate(self, ids, max_tokens): return dict(ids=ids[:max_tokens], finish_reason='length')\n"
    )
    with open_engine(f"py:{file}:Least", MODEL) as engine:
        assert engine.generate([7, 8], max_tokens=1).ids == (7,)
        for name, value in (("stop", ["x"]), ("ignore_eos", True), ("seed", 1)):
            with pytest.raises(MissingCapability, match=f"does not take {name}"):
                engine.generate([7], max_tokens=1, **{name: value})


@pytest.mark.engines
def test_a_gate_on_a_server_that_has_all_of_it_is_green(server: Started, tmp_path: Path) -> None:
    """By its address alone, faults included: nothing is failed, inconclusive or left without a kill."""
    server.switch()
    spec, out = f"{server.url},arithmetic=float32", tmp_path / "out"
    invoke("gate", "contract", "--engine", spec, "--model", MODEL, "-j", "1", "--out", str(out))
    verdict = msgspec.json.decode((out / "verdict.json").read_bytes())
    assert verdict["counts"]["passed"] == verdict["counts"]["checks"] == len(sight.JUDGES) + 2
    assert {item["status"] for item in verdict["items"]} == {"proven"}
    seen = {check["check"]: check["detail"].get("killed", {}) for check in verdict["checks"]}
    killed = seen["contract.sees_answers"].keys() | seen["contract.sees_files"].keys()
    assert killed == sight.JUDGES.keys()


@pytest.mark.engines
@pytest.mark.parametrize("turn", range(20))
def test_a_sound_server_alarms_in_no_run(
    turn: int, server: Started, golden: Golden, oracle: Embedded
) -> None:
    """Twenty runs of every check, each on other prompts and with the server in another state, say nothing."""
    at = turn % len(golden.prompts)
    turned = msgspec.structs.replace(golden, prompts=[*golden.prompts[at:], *golden.prompts[:at]][:3])
    said = {check: said_of(server, check, turned, oracle) for check in sight.JUDGES}
    assert said == dict.fromkeys(sight.JUDGES, "")


def test_what_passes_a_judge_is_told(
    golden: Golden, oracle: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that sees nothing is itself found: the fault that is put before it passes."""
    with open_engine("numpy", MODEL) as engine:
        client = Client(Observer(), engine, golden, oracle)
        monkeypatch.setitem(sight.JUDGES, "contract.tokens", lambda _: None)
        with pytest.raises(CheckFailed, match=r"contract.tokens lets it pass through this connector"):
            sight.answers(client)


def test_a_change_that_the_engine_does_not_read_is_found(
    golden: Golden, oracle: Embedded, tmp_path: Path
) -> None:
    """An engine that opens the file as it was, whatever file it is given, does not pass for one that sees."""
    with open_engine("numpy", MODEL) as engine:
        client = Client(Observer(), engine, golden, oracle, lambda _: open_engine("numpy", MODEL), tmp_path)
        with pytest.raises(CheckFailed, match="file_bos_flag: not seen through this connector"):
            sight.files(client)


def test_what_was_seen_is_noted_by_check(golden: Golden, oracle: Embedded, tmp_path: Path) -> None:
    """Each check of the contract finds one spoiled answer at least, and a gate is told which."""
    by_check: dict[str, list[str]] = {}
    for answer in ANSWERS:
        by_check.setdefault(answer.kills, []).append(answer.name)
    alone = {check for check in check_ids() if check.startswith("contract.") and "sees_" not in check}
    assert by_check.keys() == alone == sight.JUDGES.keys()
    reopen = lambda path: open_engine("numpy", path)  # noqa: E731
    with open_engine("numpy", MODEL) as engine:
        client = Client(Observer(), engine, golden, oracle, reopen, tmp_path)
        seen, said, lacking = sight.answers(client)
    by_check["contract.streaming"].remove("answer_split")
    assert (dict(seen), lacking) == (by_check, ["answer_split"]), "an engine of ids has no text to break"
    assert client.observe.detail["killed"] == by_check
    assert all(said.values())


def test_every_change_is_of_some_packaged_file_and_changes_bytes(tmp_path: Path) -> None:
    """Each fault of the table can be planted in a packaged model, and the copy is another file."""
    assert len({change.name for change in CHANGES}) == len(CHANGES) >= 25
    left = {change.name: change for change in CHANGES}
    for name in FAMILIES:
        model = resolve_model(f"fixture:{name}")
        for change in list(left.values()):
            if (copy := changed.planted(change, model, tmp_path)) is not None:
                assert copy.read_bytes() != model.read_bytes(), change.name
                assert copy.stat().st_size == model.stat().st_size
                del left[change.name]
                copy.unlink()
    assert not left


def test_an_answer_is_no_refusal_and_a_lack_is_none() -> None:
    """What is refused is a sentence of the engine's; what it does not offer proves nothing."""

    def lacks() -> Any:
        raise MissingCapability("engine x does not offer generate")

    def refuses() -> Any:
        raise PrillError("no")

    client = Client(Observer(), None, None, None)  # type: ignore[arg-type]
    with pytest.raises(MissingCapability):
        client.refused("x", lacks)
    assert "no" in client.refused("x", refuses)
    assert client.observe.observed == 1


def test_the_gate_counts_a_check_only_beside_its_sight() -> None:
    """Every item of the contract that a fault can be put before names a check that sees it."""
    from prill_harness.decide.checklist import load_checklists

    assert load_policy(packaged() / "gates.toml").gate("contract").checklists == ("contract",)
    (contract,) = load_checklists(["contract"])
    alone = [
        item.id
        for item in contract.items
        if not any(check.startswith("contract.sees_") for check in item.checks)
    ]
    assert alone == []
