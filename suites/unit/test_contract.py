"""An engine that nobody here wrote is held to the contract: a sound one passes, defects are found by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prill_harness.engines.embedded import Embedded
from prill_harness.faults.opening import open_engine
from prill_harness.faults.trial import changed
from prill_harness.faults.trial.changes import CHANGES
from prill_harness.plan.policy import load_policy
from prill_harness.records.catalog import packaged
from prill_harness.run.checks import CheckFailed, Observer
from prill_harness.tokens.golden import Golden, golden_for
from prill_runtime.errors import EngineError, InvalidParameter, MissingCapability, PrillError
from prill_suites import contract_judges as judges
from prill_suites import contract_requests as requests
from prill_suites import contract_sight as sight
from prill_suites.contract_judges import Client, Judge

from .served import WRONG_AT
from .serving import MODEL, Started, oracle

__all__ = ["oracle"]

FAMILIES = ("llama-tiny", "gpt2-tiny", "llama-window", "gpt-oss-tiny", "gemma3-tiny", "llama-tiny:q8_0")

MINE = '''
import math
from prill_harness.faults.opening import open_engine


class Mine:
    """A sound engine of three methods and more, and every defect that is switched on."""
    arithmetic, defect, count = "float32", "", 0

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


SOUND = (
    judges.tokenization, judges.round_trip, judges.choices, judges.numbers, judges.before_temperature,
    judges.configuration, requests.repeatable, requests.seeds, requests.lengths, requests.stops,
    requests.context, requests.vocabulary, requests.streaming, requests.cancelled,
)  # fmt: skip


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
        ("warm", requests.repeatable, "the same request gives other logprobs"),
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


def test_a_server_is_judged_by_the_same(golden: Golden, oracle: Embedded) -> None:
    """Over HTTP: what is right passes; a server that ignores seeds, and one that gets a token wrong, and
    one that breaks when no token is asked for, are found."""
    server = Started("llama")
    try:
        with open_engine(f"{server.url},arithmetic=float32", MODEL) as engine:

            def says(judge: Judge) -> str:
                return sight.judged(judge, Client(Observer(), engine, golden, oracle), engine)

            assert says(requests.vocabulary) == says(requests.stops) == ""
            assert "all give the same text" in says(requests.seeds)
            assert "breaks off" in says(requests.lengths) or "disconnected" in says(requests.lengths)
            server.switch("token")
            assert f"prompt 0, token {WRONG_AT}: expected" in says(judges.choices)
    finally:
        server.process.kill()
        server.process.wait()


def test_what_passes_a_judge_is_told(
    golden: Golden, oracle: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that sees nothing is itself found: the fault that is put before it passes."""
    with open_engine("numpy", MODEL) as engine:
        client = Client(Observer(), engine, golden, oracle)
        blind = {"a token exchanged": (lambda _: None, sight.SPOILED["a token exchanged"][1])}
        monkeypatch.setattr(sight, "SPOILED", blind)
        with pytest.raises(CheckFailed, match="a token exchanged: <lambda> lets it pass"):
            sight.answers(client)


def test_a_change_that_the_engine_does_not_read_is_found(
    golden: Golden, oracle: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that opens the file as it was, whatever file it is given, does not pass for one that sees."""
    from prill_harness.engines.models import resolve_model

    model = resolve_model(MODEL)
    real = sight.open_engine
    monkeypatch.setattr(
        sight, "open_engine", lambda spec, path: real(spec, path if spec == "numpy64" else model)
    )
    with open_engine("numpy", MODEL) as engine:
        client = Client(Observer(), engine, golden, oracle)
        with pytest.raises(CheckFailed, match="file_bos_flag: not seen through this connector"):
            sight.files(client, "numpy", model, tmp_path, False)


def test_every_change_is_of_some_packaged_file_and_changes_bytes(tmp_path: Path) -> None:
    """Each fault of the table can be planted in a packaged model, and the copy is another file."""
    from prill_harness.engines.models import resolve_model

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
    assert alone == ["contract.configuration"]
