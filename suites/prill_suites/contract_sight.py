"""Whether the judges of the contract see, through this very connector: each is shown a known fault."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec

from prill_harness.engines.base import Engine
from prill_harness.engines.embedded import Embedded
from prill_harness.faults.blackbox import changed
from prill_harness.faults.blackbox.answers import ANSWERS
from prill_harness.faults.blackbox.changes import CHANGES
from prill_harness.faults.blackbox.through import Through
from prill_harness.faults.opening import open_engine
from prill_harness.run.checks import CheckFailed, Observer
from prill_runtime.errors import EngineError, Inconclusive, InvalidParameter
from prill_suites import contract_judges as judges
from prill_suites import contract_repeats as repeats
from prill_suites import contract_requests as requests
from prill_suites.contract_judges import Client, Judge

JUDGES: dict[str, Judge] = {
    "contract.tokenization": judges.tokenization,
    "contract.round_trip": judges.round_trip,
    "contract.tokens": judges.choices,
    "contract.logprobs": judges.numbers,
    "contract.raw_logprobs": judges.before_temperature,
    "contract.configuration": judges.configuration,
    "contract.repeatable": repeats.repeatable,
    "contract.beside": repeats.beside,
    "contract.continued": repeats.continued,
    "contract.seeds": requests.seeds,
    "contract.lengths": requests.lengths,
    "contract.end": requests.ended,
    "contract.stops": requests.stops,
    "contract.context": requests.context,
    "contract.vocabulary": requests.vocabulary,
    "contract.streaming": requests.streaming,
    "contract.cancel": requests.cancelled,
}
"""The judge of each check."""

Seen = dict[str, list[str]]
"""Check -> the faults that it was seen to find."""


def judged(check: str, client: Client) -> str:
    """The sentence by which a check's judge finds an engine wrong; empty if it finds nothing.

    Raises:
        Inconclusive: the engine lacks what the judge asks for.
    """
    try:
        JUDGES[check](replace(client, observe=Observer()))
    except (CheckFailed, EngineError, InvalidParameter) as error:
        return str(error) or check
    return ""


def answers(client: Client) -> tuple[Seen, dict[str, str], list[str]]:
    """The checks that found the fault put before them, what they said of it, and the faults of which nothing
    can be said.

    Raises:
        CheckFailed: a judge lets its fault pass.
    """
    seen, said, lacking = defaultdict[str, list[str]](list), dict[str, str](), list[str]()
    size = client.oracle.model.vocab_size
    for fault in ANSWERS:

        def spoiled(engine: Engine, spoils: Mapping[str, object] = fault.spoils) -> Engine:
            return Through(engine, vocabulary=size, context=client.context, **spoils)  # type: ignore[arg-type]

        def again(path: Path, spoiled: Callable[[Engine], Engine] = spoiled) -> Engine:
            assert client.reopen is not None
            return spoiled(client.reopen(path))

        reopen = again if client.reopen else None
        try:
            sentence = judged(fault.kills, replace(client, engine=spoiled(client.engine), reopen=reopen))
        except Inconclusive:
            lacking.append(fault.name)
            continue
        if not sentence:
            raise CheckFailed(f"{fault.kills} lets it pass through this connector: {fault.summary.lower()}")
        said[fault.name] = sentence
        seen[fault.kills].append(fault.name)
        client.observe.note(killed=seen)
    return seen, said, lacking


PARTS: Mapping[str, Sequence[str]] = {
    changed.TOKENIZER: ("contract.tokenization",),
    changed.NUMBERS: ("contract.tokens", "contract.logprobs"),
}
PROMPTS = 2  # of the golden, for each changed file


def files(client: Client) -> tuple[dict[str, str], list[str]]:
    """What is said of the engine on each changed file; and the changes that drown in its lane's noise. An
    engine that has its model already keeps it, and its judge is given the changed file.

    Raises:
        CheckFailed: a change passes, or is blamed on another part.
    """
    few = msgspec.structs.replace(client.golden, prompts=client.golden.prompts[:PROMPTS])
    client = replace(client, golden=few)
    said: dict[str, str] = {}
    seen, drowned = defaultdict[str, list[str]](list), list[str]()
    if (sound := _blamed(client))[0]:
        raise Inconclusive(f"the engine is wrong on the file as it is, so no change of it shows: {sound[2]}")
    for change, copy in changed.applicable(CHANGES, client.model, client.folder):
        with open_engine("numpy64", copy) as right:
            assert isinstance(right, Embedded)
            if client.reopen is None:
                part, check, sentence = _blamed(replace(client, oracle=right))
            else:
                with client.reopen(copy) as engine:
                    part, check, sentence = _blamed(replace(client, engine=engine))
            if not part:
                as_exact = Through(right, told={"arithmetic": client.engine.info.arithmetic})
                part, check, sentence = _blamed(replace(client, engine=as_exact))
                if part:
                    raise CheckFailed(
                        f"{change.name}: not seen through this connector ({change.summary.lower()})"
                    )
                drowned.append(change.name)
                continue
        if part != change.blames:
            raise CheckFailed(
                f"{change.name} is blamed on the {part}, it breaks the {change.blames}: {sentence}"
            )
        said[change.name] = sentence
        seen[check].append(change.name)
        client.observe.note(killed=seen)
    return said, drowned


def _blamed(client: Client) -> tuple[str, str, str]:
    """The first part that is found wrong, by which check, and why; empty if none is."""
    for part, checks in PARTS.items():
        for check in checks:
            with suppress(Inconclusive):
                if sentence := judged(check, client):
                    return part, check, sentence
    return "", "", ""
