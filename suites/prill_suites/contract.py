"""Does an engine keep what every engine promises? The same of each connector, whoever wrote it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from prill_harness.engines.base import Capability, Engine
from prill_harness.engines.embedded import Embedded
from prill_harness.engines.spec import EngineSpec
from prill_harness.faults.blackbox.answers import ANSWERS
from prill_harness.faults.opening import has_model, open_engine
from prill_harness.run.checks import CheckFailed, Observer, check
from prill_harness.tokens.golden import Golden
from prill_runtime.errors import MissingCapability
from prill_suites import contract_judges as judges
from prill_suites import contract_repeats as repeats
from prill_suites import contract_requests as requests
from prill_suites import contract_sight as sight
from prill_suites.contract_judges import Client

TEXTS, IDS = (Capability.GENERATE,), (Capability.TOKENIZE,)
TOGETHER = (Capability.GENERATE, Capability.BATCH)
FEWEST = 6  # faults that have to have been seen


@pytest.fixture
def client(
    observe: Observer,
    engine: Engine,
    golden: Golden,
    oracle: Embedded,
    pytestconfig: pytest.Config,
    tmp_path: Path,
) -> Client:
    spec = str(pytestconfig.getoption("prill_engine"))
    reopen = None if has_model(EngineSpec.parse(spec)) else partial(open_engine, spec)
    return Client(observe, engine, golden, oracle, reopen, tmp_path, explains=True)


@check("contract.tokenization", kills=("bos_missing", "merge_order", "special_token_split"), needs=IDS)
def test_tokenization(client: Client) -> None:
    """Texts have the ids that the file gives them: spaces, CRLF, bytes, special tokens, BOS, EOS."""
    judges.tokenization(client)


@check("contract.round_trip", kills=("pieces_decoded_alone", "every_space_stripped"), needs=IDS)
def test_round_trip(client: Client) -> None:
    """A text's ids, decoded, are the text."""
    judges.round_trip(client)


@check("contract.tokens", kills=("rope_pairing", "temperature_zero_sampled"), needs=TEXTS)
def test_tokens(client: Client) -> None:
    """What the engine writes is right at every position, near ties within their budget."""
    judges.choices(client)


@check("contract.logprobs", kills=("logprob_base_two", "logits_scaled"), needs=TEXTS)
def test_logprobs(client: Client) -> None:
    """The logprobs that it tells are those of their ids, and add up to one at most."""
    judges.numbers(client)


@check("contract.raw_logprobs", kills=("logprob_after_temperature", "logprob_of_best"), needs=TEXTS)
def test_raw_logprobs(client: Client) -> None:
    """Logprobs are those before the temperature."""
    judges.before_temperature(client)


@check("contract.repeatable", kills=("cache_not_cleared", "models_share_state"), needs=TEXTS)
def test_repeatable(client: Client) -> None:
    """A greedy text is the same cold and warm, behind other requests and another model."""
    repeats.repeatable(client)


@check("contract.beside", kills=("batch_rows_mixed",), needs=TOGETHER)
def test_beside(client: Client) -> None:
    """Eight requests on their way at one time have the texts that each has alone."""
    repeats.beside(client)


@check("contract.continued", kills=("rope_position_restarts", "cache_last_row_not_written"), needs=TEXTS)
def test_continued(client: Client) -> None:
    """A text asked for in two parts, cut anywhere, is the text in one: prefill and decode agree."""
    repeats.continued(client)


@check("contract.seeds", kills=("seed_ignored", "rng_advances", "sampling_ignored"), needs=TEXTS)
def test_seeds(client: Client) -> None:
    """One seed gives one text, another seed another."""
    requests.seeds(client)


@check("contract.lengths", kills=("max_tokens_off_by_one", "no_tokens_are_one"), needs=TEXTS)
def test_lengths(client: Client) -> None:
    """Texts of no token, one and several are as long as asked for."""
    requests.lengths(client)


@check("contract.end", kills=("eos_ignored", "eos_included", "ignore_eos_ignored"), needs=TEXTS)
def test_end(client: Client) -> None:
    """A text ends where the file says that texts end, unless told to ignore it."""
    requests.ended(client)


@check("contract.stops", kills=("stop_ignored", "stop_within_token_only"), needs=TEXTS)
def test_stops(client: Client) -> None:
    """A stop string that is split over tokens ends the text where it is complete."""
    requests.stops(client)


@check("contract.context", kills=("context_unchecked", "cache_capacity_new_tokens_only"), needs=TEXTS)
def test_context(client: Client) -> None:
    """A full context ends a text, one position too many is refused, and the next request is right."""
    requests.context(client)


@check("contract.vocabulary", kills=("id_range_unchecked", "negative_id_accepted"), needs=TEXTS)
def test_vocabulary(client: Client) -> None:
    """Ids outside the vocabulary are refused, and the next request is right."""
    requests.vocabulary(client)


@check("contract.streaming", kills=("callback_missing",), needs=TEXTS)
def test_streaming(client: Client) -> None:
    """A text that is told as it is written is the whole text."""
    requests.streaming(client)


@check("contract.cancel", kills=("cancel_ignored", "cancel_leaves_cache"), needs=TEXTS)
def test_cancel(client: Client) -> None:
    """A callback that says no ends the text, and the next request is right."""
    requests.cancelled(client)


@check("contract.configuration", kills=("rms_eps_from_wrong_key",))
def test_configuration(client: Client) -> None:
    """What the engine reports of its configuration is the file's."""
    judges.configuration(client)


@check("contract.sees_answers", kills=("expectations_ignored",), needs=TEXTS)
def test_sees_answers(client: Client) -> None:
    """Each of these checks, shown the engine behind a known fault, finds it: through this very connector."""
    seen, said, lacking = sight.answers(client)
    client.observe.note(killed=seen, seen=said, lacking=lacking)
    if len(said) < FEWEST:
        raise MissingCapability(f"only {len(said)} of {len(ANSWERS)} faults could be put before this engine")
    client.observe.saw(len(said), oracle="the faults that were put before the engine")
    more = f"; nothing can be said of {', '.join(lacking)}" if lacking else ""
    client.observe.say(f"{len(said)} faults put before the engine, each found by its check{more}")


@check("contract.sees_files", kills=("expectations_ignored",), needs=TEXTS)
def test_sees_files(client: Client) -> None:
    """Each changed file, given to the engine and not to its judge, is found, and blamed on the right part."""
    said, drowned = sight.files(client)
    client.observe.note(seen=said, drowned=drowned)
    if len(said) < FEWEST:
        raise CheckFailed(
            f"only {len(said)} changed files could be told apart, at least {FEWEST} are expected"
        )
    client.observe.saw(len(said), oracle="the changes that were made to the file")
    more = f"; in this lane's noise drown {', '.join(drowned)}" if drowned else ""
    client.observe.say(f"{len(said)} changed files, each found and blamed on the right part{more}")
