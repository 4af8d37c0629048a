"""The whole CUDA engine on the emulator: golden tokens, graphs, traces, memory, and faults of a device."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from prill_harness import Capability, Engine, open_engine
from prill_harness.faults.catalogue import catalogue
from prill_harness.numbers import lanes
from prill_harness.tokens.golden import golden_for
from prill_runtime.device.machine.emulator import EmuDevice
from prill_runtime.device.memory.slot import RING_IDS, Slot
from prill_runtime.errors import NotANumber, PrillError, UsageError
from prill_runtime.run.generate import logprob
from prill_runtime.sampling.sampler import SamplingParams, sample

from .decoded import decoded

MODELS = ("fixture:llama-tiny", "fixture:gpt2-tiny")
NMSE = 1e-10  # float32 beside float64 (docs/adr/0002-lanes.md, ops)
WRONG = 1e-6  # a stage this far off is not rounding


@pytest.fixture(scope="module", params=MODELS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with open_engine("emu", request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def llama() -> Iterator[Engine]:
    with open_engine("emu", MODELS[0]) as opened:
        yield opened


def prompt(spec: str, length: int = 40) -> list[int]:
    return list(golden_for(spec).prompts[0].ids[:length])


def stages(engine: Engine, ids: list[int]) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float64) for name, array in engine.trace(ids)}


def draws_wrong(engine: Engine, ids: list[int]) -> bool:
    """Whether the engine draws other ids than the host does: in a text, or between ties; or none at all."""
    settings = {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "repetition_penalty": 2.0, "seed": 5}
    ties = np.array([1, 1, 0, 1], np.float32)
    try:
        text = engine.generate(ids, max_tokens=30, ignore_eos=True, **settings).ids
        tied = engine.ops().draw(ties, SamplingParams(temperature=1.0), 3)  # type: ignore[attr-defined]
    except PrillError as error:
        return "sampling on the device" in str(error)
    wrong = tied != sample(ties, SamplingParams(temperature=1.0), 3)
    return wrong or list(text) != on_the_host(engine, ids, 30, **settings)[0]


def on_the_host(engine: Engine, ids: list[int], count: int, **settings: Any) -> tuple[list[int], list[float]]:
    """Ids and logprobs of a text that the host draws from downloaded logits of the same engine."""
    model, params = engine.model, SamplingParams(**settings)  # type: ignore[attr-defined]
    cache, text, logprobs = model.new_cache(len(ids) + count), list(ids), []
    row = model.forward([(cache, ids)], last_only=True)[0][-1]
    for left in reversed(range(count)):
        text.append(sample(row, params, cache.length, text))
        logprobs.append(logprob(row, text[-1]))
        if left:
            row = decoded(model, cache, text[-1])
    cache.close()
    return text[len(ids) :], logprobs


def first_wrong(candidate: dict[str, np.ndarray], oracle: dict[str, np.ndarray]) -> str | None:
    """The first stage that is further off than rounding, without its block."""
    assert list(candidate) == list(oracle)
    for name, expected in oracle.items():
        error = np.sum((candidate[name].reshape(expected.shape) - expected) ** 2) / np.sum(expected**2)
        if not error <= WRONG:
            return name.rpartition(".")[2]
    return None


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k", "q6_k"])
@pytest.mark.parametrize("model", MODELS)
def test_golden_tokens(model: str, kind: str) -> None:
    """64 golden tokens of each fixture, chosen on the device by a replayed graph, and their logprobs."""
    spec = f"{model}:{kind}"
    golden = golden_for(spec).prompts[0]
    with open_engine("emu", spec) as engine:
        done = engine.generate(list(golden.ids), max_tokens=64, ignore_eos=True)
    with open_engine("numpy64", spec) as oracle:
        rows = oracle.logits([*golden.ids, *golden.tokens[:64]]).astype(np.float64)[len(golden.ids) - 1 : -1]
    assert done.ids == tuple(golden.tokens[:64])
    rows -= rows.max(-1, keepdims=True)
    expected = (rows - np.log(np.exp(rows).sum(-1, keepdims=True)))[np.arange(64), list(golden.tokens[:64])]
    assert np.abs(expected - done.logprobs).max() < 1e-4


def test_every_stage_is_right(engine: Engine) -> None:
    """Prompt processing by tiled products, stage by stage against float64."""
    ids = prompt(engine.info.model)
    with open_engine("numpy64", engine.info.model) as oracle:
        expected = stages(oracle, ids)
    got = stages(engine, ids)
    assert list(got) == list(expected)
    for name, array in expected.items():
        error = np.sum((got[name].reshape(array.shape) - array) ** 2) / np.sum(array**2)
        assert error < NMSE, name


def test_a_replaced_stage_takes_the_place_of_the_computed_one(engine: Engine) -> None:
    """What is handed in for a stage is what the rest of the pass reads."""
    ids = prompt(engine.info.model, 6)
    plain = dict(engine.trace(ids))
    changed = dict(
        engine.trace(ids, {"blk.1.attn_norm": np.zeros_like(plain["blk.1.attn_norm"], np.float64)})
    )
    assert np.array_equal(changed["blk.1.attn_norm"], plain["blk.1.attn_norm"])
    assert not changed["blk.1.v"].any() or engine.info.config["architecture"] == "gpt2"
    assert not np.array_equal(changed["logits"], plain["logits"])
    same = dict(engine.trace(ids, {name: array.astype(np.float64) for name, array in plain.items()}))
    assert all(np.array_equal(same[name], plain[name]) for name in plain)


def test_two_runs_are_bit_equal(engine: Engine) -> None:
    """Tokens, logprobs and logits, whatever was computed in between."""
    ids = prompt(engine.info.model, 20)
    first, logits = engine.generate(ids, max_tokens=8, ignore_eos=True), engine.logits(ids)
    engine.logits(ids[::-1])
    assert engine.generate(ids, max_tokens=8, ignore_eos=True) == first
    assert np.array_equal(engine.logits(ids), logits)


def test_graph_and_steps_agree(engine: Engine) -> None:
    """The captured graph chooses what feeding one id at a time gives."""
    ids = prompt(engine.info.model, 12)
    done = engine.generate(ids, max_tokens=6, ignore_eos=True)
    session = engine.session()
    rows = [session.feed(ids)[-1]]
    for token in done.ids[:-1]:
        rows.append(session.feed([token])[-1])
    session.close()
    assert [int(row.argmax()) for row in rows] == list(done.ids)


def test_more_tokens_than_the_ring_holds(llama: Engine) -> None:
    """The host reads the ring before it is written again."""
    ids = prompt(MODELS[0], 8)
    long = llama.generate(ids, max_tokens=RING_IDS + 10, ignore_eos=True)
    assert long.ids[:5] == llama.generate(ids, max_tokens=5, ignore_eos=True).ids
    rest = llama.generate([*ids, *long.ids[:RING_IDS]], max_tokens=10, ignore_eos=True)
    assert rest.ids == long.ids[RING_IDS:]


def test_stops_and_cancels_as_the_host_does(llama: Engine) -> None:
    """End of text by stop string, by cancelling, by length zero: as the NumPy engine."""
    ids = prompt(MODELS[0], 30)
    with open_engine("numpy", MODELS[0]) as reference:
        for arguments in ({"stop": (" the",)}, {"on_token": lambda token, logprob: False}, {"max_tokens": 0}):
            named = {"max_tokens": 20, "ignore_eos": True, **arguments}
            got, expected = llama.generate(ids, **named), reference.generate(ids, **named)
            assert (got.ids, got.finish_reason) == (expected.ids, expected.finish_reason)


def test_sampled_tokens_are_the_cpus(llama: Engine) -> None:
    """Seeded draws with filters and a penalty give the ids of the NumPy engine."""
    ids = prompt(MODELS[0], 30)
    drawn = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 3}
    with open_engine("numpy", MODELS[0]) as reference:
        expected = reference.generate(ids, max_tokens=8, ignore_eos=True, **drawn)
    assert llama.generate(ids, max_tokens=8, ignore_eos=True, **drawn).ids == expected.ids


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.8},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.5},
        {"repetition_penalty": 1.3},
    ],
    ids=["temperature", "filters", "penalty", "greedy with a penalty"],
)
def test_the_graph_draws_what_the_host_draws(engine: Engine, settings: dict[str, float]) -> None:
    """From the same engine's logits: the same ids and logprobs, one by one, and over more than the ring."""
    long = "min_p" in settings and engine.info.model == MODELS[0]
    ids, count = prompt(engine.info.model, 9), RING_IDS + 6 if long else 14
    done = engine.generate(ids, max_tokens=count, ignore_eos=True, seed=2**63 + 7, **settings)
    expected, logprobs = on_the_host(engine, ids, count, seed=2**63 + 7, **settings)
    assert list(done.ids) == expected
    assert np.allclose(done.logprobs, logprobs, rtol=0, atol=1e-12)
    one_by_one = engine.generate(
        ids, max_tokens=12, ignore_eos=True, seed=2**63 + 7, on_token=lambda *_: True, **settings
    )
    assert one_by_one.ids == done.ids[:12]


def test_attention_asks_for_weights_of_its_own_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the beginning of the gate and of the up matrix, 16-byte pieces, and no byte beyond either."""
    asked: list[dict[str, Any]] = []
    launch = EmuDevice.launch

    def watched(self: EmuDevice, kernel: str, grid: Any, block: Any, args: Any, shared: int = 0) -> None:
        if kernel.startswith("attention_decode"):
            asked.append(dict(args))
        launch(self, kernel, grid, block, args, shared)

    monkeypatch.setattr(EmuDevice, "launch", watched)
    with open_engine("emu:fast", f"{MODELS[0]}:q8_0") as fast:
        fast.generate([5, 6, 7], max_tokens=2, ignore_eos=True)
        weights, layers = fast.model.weights, len(fast.model.network.layers)  # type: ignore[attr-defined]
        assert [args["layer"] for args in asked] == list(range(layers))
        for layer, args in enumerate(asked):
            pair = [weights[f"blk.{layer}.ffn_{part}.weight"] for part in ("gate", "up")]
            assert [args["ahead0"], args["ahead1"]] == [matrix.pointers["q"] for matrix in pair]
            assert 0 < args["ahead_bytes"] <= min(matrix.streams["q"] for matrix in pair)
            assert args["ahead_bytes"] % 16 == 0


def test_texts_of_a_batch_go_through_the_graphs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and drawn, each as it is written alone; no step of single ops takes part."""
    ids = prompt(engine.info.model, 30)
    prompts, drawn = [ids[:20], ids[5:9]], {"temperature": 0.8, "seed": 3}
    alone = [engine.generate(one, max_tokens=6, ignore_eos=True) for one in prompts]
    alone += [engine.generate(one, max_tokens=6, ignore_eos=True, **drawn) for one in prompts]

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a step of single ops")

    monkeypatch.setattr(type(engine.model), "forward", refused)  # type: ignore[attr-defined]
    together = engine.generate_batch(prompts, max_tokens=6, ignore_eos=True)
    together += engine.generate_batch(
        prompts, max_tokens=6, ignore_eos=True, sampling=[SamplingParams(**drawn)] * 2
    )
    assert together == alone
    assert len({text.ids for text in together}) > 1


def test_a_text_drawn_inside_another_disturbs_neither(llama: Engine) -> None:
    """The device remembers the ids of one text; a text begun from a callback of another starts anew."""
    ids, settings = prompt(MODELS[0], 10), {"temperature": 1.0, "repetition_penalty": 3.0, "ignore_eos": True}
    outer = llama.generate(ids, max_tokens=6, seed=1, **settings)
    inner = llama.generate(ids[::-1], max_tokens=6, seed=2, **settings)
    nested = []

    def on_token(token: int, logprob: float) -> None:
        nested.append(llama.generate(ids[::-1], max_tokens=6, seed=2, **settings))

    assert llama.generate(ids, max_tokens=6, seed=1, on_token=on_token, **settings) == outer
    assert nested == [inner] * 6


def test_threads_that_share_an_engine_write_what_each_writes_alone(llama: Engine) -> None:
    """Greedy and drawn texts and a session, all at once: a step of one never mixes with a step of another."""
    asked: list[tuple[list[int], dict[str, Any]]] = [
        ([5, 6, 7], {}),
        ([9, 10], {}),
        ([5, 6, 7], {"temperature": 0.8, "seed": 3}),
        ([11] * 9, {"temperature": 0.7, "seed": 4, "repetition_penalty": 1.2}),
    ]

    def text(number: int) -> tuple[int, ...]:
        ids, settings = asked[number]
        return llama.generate(ids, max_tokens=6, ignore_eos=True, **settings).ids

    alone = [text(number) for number in range(len(asked))]
    rows = llama.logits([1, 2, 3, 4])
    with ThreadPoolExecutor(len(asked) + 1) as pool:
        for _ in range(3):
            beside = pool.submit(llama.logits, [1, 2, 3, 4])
            assert list(pool.map(text, range(len(asked)))) == alone
            assert np.array_equal(beside.result(), rows)


def test_drawn_texts_stop_and_cancel_as_the_host_does(llama: Engine) -> None:
    """End of text, stop strings and cancelling, in the middle of what was queued: as the NumPy engine."""
    ids, settings = prompt(MODELS[0], 30), {"max_tokens": 50, "temperature": 0.7, "top_k": 20, "seed": 4}
    with open_engine("numpy", MODELS[0]) as reference:
        cancel = {"on_token": lambda token, logprob: False}
        for arguments in ({"stop": (" the",), "ignore_eos": True}, cancel, {}):
            got, expected = (e.generate(ids, **settings, **arguments) for e in (llama, reference))
            assert (got.ids, got.finish_reason) == (expected.ids, expected.finish_reason)


def test_memory_is_the_ledger(llama: Engine) -> None:
    """Every purpose is told, a session counts while it is open, and nothing is left of activations."""
    before = llama.memory()
    assert {"weights", "cache", "activations", "scratch", "logits", "process"} <= set(before)
    with_session = llama.session(10)
    assert llama.memory()["cache"] - before["cache"] == 2 * 4 * 4 * 2 * 64 * 10
    with_session.close()
    assert llama.memory()["cache"] == before["cache"]


def test_the_engine_says_what_it_is(llama: Engine) -> None:
    """Name, device and arithmetic of the mode; every capability."""
    assert (llama.info.name, llama.info.device, llama.info.arithmetic) == (
        "emu-exact",
        "CPU emulator",
        "float32",
    )
    assert llama.info.capabilities == frozenset(Capability)


@pytest.mark.parametrize(("kind", "arithmetic"), [("f16", "half"), ("q8_0", "int8"), ("q4_k", "int8")])
def test_fast_decoding_keeps_to_its_lane(kind: str, arithmetic: str) -> None:
    """24 golden tokens through the fused kernels of the fast mode stay within the file's own lane.

    Integers round more than float32 does, so that it was not the exact mode that was looked at."""
    spec = f"{MODELS[0]}:{kind}"
    golden, count = golden_for(spec), 24
    ids, tokens = list(golden.prompts[0].ids), list(golden.prompts[0].tokens[:count])
    with open_engine("emu:fast", spec) as fast, open_engine("numpy64", spec) as oracle:
        assert fast.info.arithmetic == arithmetic
        model = fast.model  # type: ignore[attr-defined]
        cache = model.new_cache(len(ids) + count)
        model.forward([(cache, ids)])
        rows = [decoded(model, cache, token) for token in tokens]
        cache.close()
        expected = oracle.logits([*ids, *tokens])[-count:]
    lane = lanes.lane_for(kind, arithmetic)
    tally = lanes.LogitTally()
    tally.add(expected, np.array(rows), len(ids) + 1)
    figures = tally.figures()
    assert not lanes.broken(figures, lanes.bounds(lane, golden.floors[lane.name]))
    assert (figures.nmse > 1e-7) == (arithmetic == "int8")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_reported(
    llama: Engine, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """A NaN inside the graph is an error, not a token."""
    arm = Slot.arm

    def poisoned(self: Slot, sequence: np.ndarray) -> None:
        arm(self, sequence)
        self._device.fill(int(sequence["keys"][0]), 64, 0xFF)

    monkeypatch.setattr(Slot, "arm", poisoned)
    with pytest.raises(NotANumber, match="rows of logits"):
        llama.generate(prompt(MODELS[0], 5), max_tokens=4, ignore_eos=True, temperature=temperature)


# Those of area "shapes" do not show on a fixture: the op suite's shapes kill them (test_shapes.py).
@pytest.mark.parametrize("fault", sorted(n for n, f in catalogue("emu").items() if f.area == "device"))
def test_faults_of_a_device_are_killed(fault: str) -> None:
    """Every planted fault moves a stage it is blamed for, or, in the state, what the second request sees."""
    declared = catalogue("emu")[fault]
    spec = declared.models[0]
    ids = prompt(spec, 40) * 4
    if declared.blames == ("sampler",):
        with open_engine(f"emu+fault:{fault}", spec) as broken:
            assert draws_wrong(broken, ids[:20])
        return
    with open_engine(f"emu+fault:{fault}", spec) as broken, open_engine("numpy64", spec) as oracle:
        if declared.blames == ("state",):
            session = broken.session()
            pieces = np.concatenate([session.feed(ids[:10]), session.feed(ids[10:20])])
            session.close()
            whole = oracle.logits(ids[:20])
            assert np.allclose(pieces[:10], whole[:10], atol=1e-3)
            assert np.abs(pieces[10:] - whole[10:]).max() > 0.1
            return
        try:
            found = first_wrong(stages(broken, ids), stages(oracle, ids))
        except NotANumber as error:
            found = error.where.rpartition(".")[2]
    assert found in declared.blames


def test_device_faults_stay_out_of_the_numpy_catalogue() -> None:
    """The matrix runs NumPy, where a device's fault could not show; by name they are found all the same."""
    assert catalogue("emu")
    assert not set(catalogue("emu")) & set(catalogue())


def test_errors_are_one_sentence() -> None:
    """A bad argument, a budget that is too small, a GPU that is not there."""
    for spec in ("emu:quick", "emu:budget=1MiB", "cuda:99"):
        with pytest.raises(PrillError) as caught:
            open_engine(spec, MODELS[0])
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="bad engine argument"):
        open_engine("emu:quick", MODELS[0])
