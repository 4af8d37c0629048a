"""Is a library sound at its boundary? Raw calls of prill_engine.h that nobody ought to make, in processes.

A library is judged as `capi:PATH.so`. For an engine of prill's own the example engine stands in, which has a
defect for each of these checks to find.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from prill_harness.engines.base import Engine
from prill_harness.engines.embedded import Embedded
from prill_harness.engines.others.capi.abi import FUNCTIONS
from prill_harness.leaks.ledgers.build import preloaded
from prill_harness.numbers import lanes
from prill_harness.numbers.compare import nmse
from prill_harness.run.checks import Observer, check
from prill_harness.tokens.golden import Golden
from prill_harness.tokens.sides import oracle_logits
from prill_suites.boundary_files import broken
from prill_suites.boundary_play import (
    HANDLES,
    IDS,
    CallBench,
    Step,
    by_handle,
    library_of,
    ok,
    overlapped,
    refused,
    rows,
)

NOT_GIVEN = (1, 4096, 0xDEAD_BEEF_0000_0001, 0x7FFF_FFFF_FFFF_FFF0, (1 << 64) - 1)
MAY_BE_NULL = {("context_create", "options"), ("session_next", "logprob"), ("last_error", "needed")}
DAMAGED = ("model_load_failed", "unsupported_type", "tokenizer")
FULL = "context_length_exceeded"
LONG = 400  # ids whose logits take long enough to be met in the middle
WALKED = 120  # allocations of a call that are failed, spread over all of them
FIGURES = re.compile(r"\d+.*\d+", re.DOTALL)


@pytest.fixture
def bench(observe: Observer, engine: Engine, pytestconfig: pytest.Config, model_path: Path) -> CallBench:
    spec = str(pytestconfig.getoption("prill_engine"))
    return CallBench(observe, library_of(spec, type(engine)), model_path)


@pytest.fixture
def ledgered(bench: CallBench) -> Iterator[CallBench]:
    """The bench, its processes with the ledger of allocations."""
    with preloaded(os.environ.get("LD_PRELOAD", "")) as (bench.preload, bench.files):
        yield bench


@check("boundary.interface", kills=("library_version_wrong", "library_device_unchecked", "library_prints"))
def test_interface(bench: CallBench) -> None:
    """The version is the header's, devices and options that are none are refused, and nothing is printed."""
    call, none = "context_create", ("device_not_found", "invalid_device")
    bench.play([refused(call, "invalid_device", device=-1), refused(call, *none, device=9999)])
    bench.play([refused(call, options="no_such_option=1"), refused(call, options="memory=much")])
    said = bench.printed([*bench.opened(), bench.logits("$s")])
    bench.expect(not said, f"the library writes on the standard output: {said[:80]!r}")
    about = {name: bench.info[name] for name in ("name", "version", "device", "arithmetic")}
    bench.expect(all(about.values()), f"context_device leaves something empty: {about}")
    bench.done(f"{about['name']} {about['version']} answers all calls of the header, and prints nothing")


@check("boundary.null_handles", kills=("library_null_handle_crashes", "library_error_silent"))
def test_null_handles(bench: CallBench) -> None:
    """The handle 0 is refused by every call, with a sentence."""
    steps = [refused(name, **{kind: 0}, **bench.sound(name)) for name, kind in by_handle()]
    bench.play([*bench.opened(), *steps])
    bench.done(f"{len(steps)} calls refuse the handle 0")


@check("boundary.null_pointers", kills=("library_null_buffer_crashes",))
def test_null_pointers(bench: CallBench) -> None:
    """A null pointer where one is needed is refused by every call."""
    steps = []
    for name, arguments in FUNCTIONS.items():
        own = {kind: f"${HANDLES[kind]}" for kind in arguments if kind in HANDLES} | bench.sound(name)
        for argument, kind in arguments.items():
            if kind in ("i32", "u64") or (name, argument) in MAY_BE_NULL:
                continue
            more = {"bytes": 16} if name == "last_error" else {}
            steps.append(refused(name, **{**own, **more, "count": len(IDS), argument: None}))
    bench.play([*bench.opened(), *steps])
    bench.done(f"{len(steps)} null pointers are refused")


@check("boundary.dangling", kills=("library_handle_dereferenced",))
def test_dangling(bench: CallBench) -> None:
    """Handles that were never given, and handles of another kind, are refused by every call."""
    steps = []
    for name, kind in by_handle():
        others = [f"${mark}" for other, mark in HANDLES.items() if other != kind]
        steps += [refused(name, **{kind: handle}, **bench.sound(name)) for handle in (*NOT_GIVEN, *others)]
    bench.play([*bench.opened(), *steps])
    bench.done(f"{len(steps)} calls with handles that are none are refused")


@check("boundary.freed", kills=("library_handle_unchecked", "library_children_survive"))
def test_freed(bench: CallBench) -> None:
    """What was freed is refused by every call, twice freed too, and so is what belonged to it."""
    dead: dict[str, list[Step]] = {kind: [] for kind in HANDLES}
    for name, kind in by_handle():
        dead[kind].append(refused(name, **{kind: f"${HANDLES[kind]}"}, **bench.sound(name)))
    again = ok("session_create", model="$m", positions=64, **{"as": "t"})
    steps = [ok("session_free", session="$s"), *dead["session"], again, *dead["session"]]
    steps += [ok("model_free", model="$m"), *dead["model"]]
    steps += [refused(n, session="$t", **bench.sound(n)) for n, k in by_handle() if k == "session"]
    steps += [bench.load("c", "m"), ok("session_create", model="$m", positions=64, **{"as": "s"})]
    steps += [ok("context_destroy", context="$c"), *dead["session"], *dead["model"], *dead["context"]]
    bench.play([*bench.opened(), *steps])
    bench.done(f"{len(steps)} calls: everything that was freed is refused, and what belonged to it")


@check("boundary.lengths", kills=(
    "library_zero_length_crashes", "library_positions_wrap", "library_room_unchecked",
    "library_buffer_overruns", "library_error_overruns"))  # fmt: skip
def test_lengths(bench: CallBench) -> None:
    """Lengths of zero, too small and huge ones are refused, and nothing is written behind a buffer."""
    n, vocab = len(IDS), bench.vocab
    held = {"session": "$s", "ids": list(IDS), "held": n * vocab}
    huge = (1 << 32, 1 << 62, (1 << 64) // vocab + 1, (1 << 64) - 1)
    too_many = (FULL, "invalid_parameter")
    steps: list[Step] = [refused("session_logits", **held, count=0, room=n * vocab)]
    steps += [refused("session_next", session="$s", ids=list(IDS), count=0)]
    steps += [refused("session_logits", **held, room=room) for room in (0, 1, vocab, n * vocab - 1)]
    steps += [refused("session_logits", *too_many, **held, count=c, room=(1 << 64) - 1) for c in huge]
    steps += [refused("session_next", *too_many, session="$s", ids=list(IDS), count=c) for c in huge]
    positions = (0, bench.context + 1, (1 << 16) + 8, *huge)
    steps += [refused("session_create", model="$m", positions=count) for count in positions]
    steps += [bench.logits("$s"), refused("model_free", model=0)]
    steps += [ok("last_error", bytes=count) for count in (1, 2, 8, 1024)]
    answers = bench.play([*bench.opened(), *steps])
    last = len(bench.opened()) + len(steps)
    said = [str(answers.get(number, {}).get("out")) for number in range(last - 4, last)]
    right = [said[-1][:0], said[-1][:1], said[-1][:7], said[-1]]
    bench.expect(said == right, f"last_error gives {said}, expected {right}")
    bench.done(f"{len(steps)} lengths of zero, too small, exact and huge")


@check("boundary.ids", kills=("library_id_unchecked",))
def test_ids(bench: CallBench) -> None:
    """Ids outside the vocabulary are refused at every place."""
    bad = (-1, bench.vocab, 2**31 - 1, -(2**31))
    steps = []
    for ids in [[each, *IDS] for each in bad] + [[*IDS, each] for each in bad]:
        steps += [refused("session_next", session="$s", ids=ids)]
        steps += [refused("session_logits", session="$s", ids=ids, room=len(ids) * bench.vocab)]
    after = len(bench.opened()) + len(steps)
    answers = bench.play([*bench.opened(), *steps, bench.logits("$s")])
    bench.same("behind refused ids, a session", answers.get(after, {}))
    bench.done(f"{len(steps)} calls with ids outside the vocabulary are refused")


@check("boundary.context", kills=("library_context_unchecked", "library_error_unknown"))
def test_context(bench: CallBench) -> None:
    """One position too many is refused as such and appends nothing; the last one that fits works."""
    n = len(IDS)
    small = ok("session_create", model="$m", positions=n, **{"as": "t"})
    one = {"ids": [IDS[0]], "room": bench.vocab}
    more = {"ids": [*IDS, 1], "room": (n + 1) * bench.vocab}
    steps = [
        small, refused("session_logits", FULL, session="$t", **more), bench.logits("$t"),
        refused("session_logits", FULL, session="$t", **one),
        refused("session_next", FULL, session="$t", ids=[IDS[0]]),
        refused("session_create", model="$m", positions=bench.context + 1),
    ]  # fmt: skip
    answers = bench.play([*bench.opened(), *steps])
    bench.same("a session filled to its end", answers.get(5, {}))
    bench.done(f"a session of {n} positions takes {n}, and refuses one more as {FULL}")


@check("boundary.sampling", kills=("library_sampling_unchecked",))
def test_sampling(bench: CallBench) -> None:
    """Parameters of sampling out of their range are refused, those at its ends work, a seed gives one id."""
    nan = float("nan")
    bad = [("temperature", -1.0), ("temperature", nan), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5),
           ("top_p", nan), ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0),
           ("repetition_penalty", nan)]  # fmt: skip
    steps: list[Step] = [
        refused("session_next", session="$s", ids=list(IDS), sampling={name: value}) for name, value in bad
    ]
    drawn = {"temperature": 1.0, "top_k": 2**31 - 1, "min_p": 0.0, "seed": (1 << 64) - 1}
    for mark in "tu":
        steps += [ok("session_create", model="$m", positions=8, **{"as": mark})]
        steps += [ok("session_next", session=f"${mark}", ids=list(IDS), sampling=drawn)]
    answers = bench.play([*bench.opened(), *steps])
    ids = [answer["id"] for answer in answers.values() if answer["code"] == "ok" and "id" in answer]
    bench.expect(len(set(ids)) <= 1, f"one seed gives the ids {ids}")
    bench.expect(all(0 <= each < bench.vocab for each in ids), f"ids outside the vocabulary are drawn: {ids}")
    bench.done(f"{len(bad)} parameters out of their range are refused")


@check("boundary.threads", kills=("library_thread_bound", "library_error_shared", "library_busy_unchecked"))
def test_threads(bench: CallBench) -> None:
    """Any thread may call, each has its own last error, and one session is worked with by one at a time."""
    long = [IDS[0]] * min(LONG, bench.context)
    steps: list[Step] = [
        ok("session_create", model="$m", positions=64, thread="b", **{"as": "t"}),
        bench.logits("$t", thread="b"),
        ok("session_free", session="$t"), refused("model_free", model=0),
        ok("last_error", bytes=200, thread="c"), refused("session_free", session=7, thread="c"),
        ok("last_error", bytes=200),
        ok("session_create", model="$m", positions=len(long), **{"as": "u"}),
        bench.logits("$u", long, thread="d", wait=False), {"pause": 0.1},
        {k: v for k, v in bench.logits("$u").items() if k != "expect"}, {"join": "d"},
    ]  # fmt: skip
    first = len(bench.opened())
    answers = bench.play([*bench.opened(), *steps])
    bench.same("another thread", answers.get(first + 1, {}))
    if first + 6 in answers:
        mine, theirs = answers[first + 3].get("sentence"), answers[first + 4].get("out")
        bench.expect(not theirs, f"a thread without an error is told another's: {theirs!r}")
        kept = answers[first + 6].get("out")
        bench.expect(kept == mine, f"another thread's error replaced {mine!r} by {kept!r}")
    if {first + 8, first + 10} <= answers.keys() and overlapped(answers[first + 10], answers[first + 8]):
        code = answers[first + 10]["code"]
        bench.expect(code == "invalid_parameter", f"a second call on a session at work: {code}, not refused")
    bench.done("calls from four threads, each with its own errors; a session at work refuses a second call")


@check("boundary.cancel", kills=(
    "library_cancel_ignored", "library_cancel_sticks", "library_cancel_leaves_ids"))  # fmt: skip
def test_cancel(bench: CallBench) -> None:
    """A session is cancelled from another thread, appends nothing, and its next call is right."""
    long = [IDS[0]] * min(LONG, bench.context - len(IDS))
    steps: list[Step] = [
        ok("session_cancel", session="$s", thread="b"),
        refused("session_logits", "cancelled", session="$s", ids=list(IDS), room=len(IDS) * bench.vocab),
        bench.logits("$s"),
        ok("session_create", model="$m", positions=len(long) + len(IDS), **{"as": "t"}),
        {k: v for k, v in bench.logits("$t", long, thread="d", wait=False).items() if k != "expect"},
        {"pause": 0.1}, ok("session_cancel", session="$t"), {"join": "d"},
        {k: v for k, v in bench.logits("$t").items() if k != "expect"},
    ]  # fmt: skip
    first = len(bench.opened())
    answers = bench.play([*bench.opened(), *steps])
    bench.same("a session that was cancelled before its first call", answers.get(first + 2, {}))
    if first + 8 in answers:
        ran, after = answers[first + 4], answers[first + 8]
        codes = [ran["code"], after["code"]]
        met = codes.count("cancelled") == 1 and set(codes) <= {"ok", "cancelled"}
        bench.expect(met, f"of a call that is cancelled and the next, one is: got {' and '.join(codes)}")
        if ran["code"] == "cancelled":
            bench.same("the call behind a cancelled one", after)
    bench.done("cancelled before a call and in the middle of one; the next call is right")


@check("boundary.memory_refused", kills=("library_memory_unspoken", "library_error_sticks"))
def test_memory_refused(bench: CallBench) -> None:
    """A bound on memory is kept, with what was needed and what there was; within it the same call works."""
    steps: list[Step] = []
    budgets = [1 << power for power in range(12, 40, 3)]
    for budget in budgets:
        steps += [ok("context_create", options=f"memory={budget}", **{"as": f"c{budget}"})]
        load = bench.load(f"c{budget}", f"m{budget}")
        steps += [{**load, "expect": ["ok", "out_of_memory"]}]
        steps += [ok("context_destroy", context=f"$c{budget}")]
    answers = bench.play(steps)
    loads = [answers[number] for number in range(1, len(steps), 3) if number in answers]
    refusals = [each for each in loads if each["code"] == "out_of_memory"]
    for each in refusals:
        said = str(each["sentence"])
        bench.expect(bool(FIGURES.search(said)), f"out of memory without its two figures: {said!r}")
    bench.expect(bool(refusals), f"a model was loaded with {budgets[0]} bytes of memory")
    bench.expect(any(e["code"] == "ok" for e in loads), "no bound on memory is wide enough for the model")
    bench.done(f"{len(refusals)} of {len(budgets)} bounds refused the model, with figures")


@check("boundary.memory_returned", kills=("library_cache_kept", "library_memory_constant"))
def test_memory_returned(bench: CallBench) -> None:
    """What the library says that it holds rises with a model and a session, and falls when they are freed."""
    look = ok("context_memory", context="$c")
    cycle = [
        look, bench.load("c", "m"), look, ok("session_create", model="$m", positions=64, **{"as": "s"}),
        bench.logits("$s"), look, ok("session_free", session="$s"), look, ok("model_free", model="$m"), look,
    ]  # fmt: skip
    answers = bench.play([ok("context_create", **{"as": "c"}), *cycle, *cycle])
    seen = [sum(a[k] for k in ("weights", "cache", "other")) for a in answers.values() if "weights" in a]
    for turn in range(0, len(seen) - 4, 5):
        idle, loaded, working, freed, after = seen[turn : turn + 5]
        rises = idle < loaded < working
        bench.expect(rises, f"memory does not rise: {idle} idle, {loaded} with a model, {working} in use")
        bench.expect(freed == loaded, f"a freed session leaves {freed - loaded} bytes behind")
        bench.expect(after == idle, f"a freed model leaves {after - idle} bytes behind")
    bench.done(f"{len(seen)} readings, back at idle after every model and session")


@check("boundary.malformed", kills=("library_truncation_unchecked",))
def test_malformed(bench: CallBench) -> None:
    """A whole file that loads, broken in one place: refused with a sentence, whatever is broken."""
    steps: list[Step] = [ok("context_create", **{"as": "c"})]
    for path in ("/nonexistent/model.gguf", "/", "/dev/null", ""):
        steps += [refused("model_load", *DAMAGED, context="$c", path=path)]
    defects = list(broken(bench.model))
    for defect in defects:
        expect = DAMAGED if defect.strict else (*DAMAGED, "ok")
        file = {"of": str(bench.model), **defect.change}
        steps += [refused("model_load", *expect, context="$c", file=file, **{"as": "m"})]
        if not defect.strict:
            steps += [{"call": "session_create", "model": "$m", "positions": 8, "as": "s"}]
            steps += [{k: v for k, v in bench.logits("$s").items() if k != "expect"}]
    bench.play(steps)
    bench.expect(len(defects) >= 40, f"only {len(defects)} defects could be made of this file")
    bench.done(f"{len(defects)} broken files, each refused with a sentence or survived")


@check("boundary.allocation", kills=("library_allocation_unchecked", "library_failed_load_kept"))
def test_allocation(ledgered: CallBench) -> None:
    """Every allocation may fail: the call says so, leaves nothing behind, and works the next time."""
    bench = ledgered
    calls: list[tuple[Step, Step | None]] = [
        (bench.load("c", "x"), {"call": "model_free", "model": "$x"}),
        (ok("session_create", model="$m", positions=64, **{"as": "x"}),
         {"call": "session_free", "session": "$x"}),
        (bench.logits("$s"), None),
        (ok("context_create", **{"as": "x"}), {"call": "context_destroy", "context": "$x"}),
    ]  # fmt: skip
    first, failed = len(bench.opened()), 0
    for call, free in calls:
        sound = bench.play([*bench.opened(), {**call, "fail": 0}], right=False).get(first, {})
        total = int(sound.get("seen", 0))
        steps: list[Step] = []
        for nth in sorted({1 + number * total // WALKED for number in range(WALKED)} if total else ()):
            each = {**call, "fail": nth, "expect": ["ok", "out_of_memory"]}
            steps += [each, free or {"pause": 0}] * 2
        answers = bench.play([*bench.opened(positions=bench.context), *steps])
        for number in range(first, first + len(steps), 4):
            pair = [answers[n] for n in (number, number + 2) if n in answers]
            failed += sum(bool(each.get("failed")) for each in pair)
            left = [int(each["left"]) for each in pair if each["code"] == "out_of_memory"]
            kept = len(left) == 2 and min(left) > 0
            bench.expect(
                not kept, f"{call['call']}, an allocation failed, leaves {left[-1:]} bytes each time"
            )
    bench.expect(failed >= 4, f"only {failed} allocations were made that could be failed")
    bench.done(f"{failed} allocations failed: each was told, nothing stayed, and the next call worked")


@check("boundary.logits", kills=("library_rope_halves",))
def test_logits(bench: CallBench, golden: Golden, oracle: Embedded) -> None:
    """Raw calls give the oracle's logits, within the lane of the library's arithmetic."""
    lane = lanes.lane_for(golden.type, str(bench.info["arithmetic"]))
    bound = lanes.bounds(lane, golden.floors[lane.name]).nmse
    ids = golden.prompts[0].ids[: min(48, bench.context)]
    answers = bench.play([*bench.opened(), bench.logits("$s", ids)], right=False)
    bench.expect("out" in answers.get(3, {}), "no logits")
    bench.done("")
    got, expected = rows(answers[3], bench.vocab), oracle_logits(oracle, ids)
    bench.observe.saw(got.size, oracle="the float64 oracle on the same file")
    bench.observe.metric("nmse", nmse(expected, got), at_most=bound)
    bench.done(f"{got.size} logits are the oracle's, NMSE at most {bound:.2g}")
