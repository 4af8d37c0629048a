"""Does the engine give back what it takes? Exact ledgers in a process of its own, path by path."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prill_harness.engines.base import Capability, Engine
from prill_harness.engines.spec import FAULT
from prill_harness.leaks.probed.kinds import KINDS
from prill_harness.leaks.reports.curves import noted
from prill_harness.leaks.reports.report import LeakVerdict, PathReport
from prill_harness.run.checks import Observer, check
from prill_runtime.errors import Inconclusive
from prill_runtime.run.model import Model

LeakProbe = Callable[..., PathReport]
WALK_S = 3.0  # a gate's share of what `prill leak` takes for all
FEWEST = 41  # readings of a series that count: where noise asks for it twice as many are taken
SMALL, REQUESTS = "synth:llama-pico:f16", 1000
READINGS = "the reading after warm-up, by ledgers that found a planted leak of 16 bytes in every 8th call"


def returns(observe: Observer, report: PathReport) -> None:
    """Hold a probe to being clean.

    Raises:
        Inconclusive: it could not see, or not tell.
    """
    observe.note(**noted(report))
    if report.verdict is LeakVerdict.INCONCLUSIVE:
        raise Inconclusive(report.sentence)
    observe.saw(sum(min(len(judged.values), FEWEST) for judged in report.seen), oracle=READINGS)
    observe.expect(report.verdict is LeakVerdict.CLEAN, f"{report.path}: {report.sentence}")
    observe.expect(report.planted, f"{report.path}: the planted leak was not found")
    walk = f"; {report.walk.sentence}" if report.walk else ""
    observe.say(f"{report.path}: {report.sentence}{walk}")


@check(
    "memory.success",
    kills=(
        "leak_on_success",
        "leak_every_eighth",
        "history_grows",
        "leak_mapping",
        "leak_descriptor",
        "leak_thread",
        "double_free",
    ),
)
def test_success(observe: Observer, leak_probe: LeakProbe) -> None:
    """Requests that work leave nothing: no block, mapping, descriptor, thread or counter."""
    returns(observe, leak_probe("success"))


@check("memory.error", kills=("leak_on_error",))
def test_error(observe: Observer, leak_probe: LeakProbe) -> None:
    """Requests that are refused leave nothing, whatever they are refused for."""
    returns(observe, leak_probe("error"))


@check("memory.cancel", kills=("leak_on_cancel",))
def test_cancel(observe: Observer, leak_probe: LeakProbe) -> None:
    """A request cancelled in mid-stream leaves nothing."""
    returns(observe, leak_probe("cancel"))


@check("memory.load", kills=("leak_on_unload", "failed_load_leaks"))
def test_load(observe: Observer, leak_probe: LeakProbe) -> None:
    """Load and unload return to the baseline, and so does a load in which an allocation fails."""
    returns(observe, leak_probe("load", walk_s=WALK_S))


@check("memory.session", kills=("session_cache_kept",))
def test_session(observe: Observer, leak_probe: LeakProbe) -> None:
    """A session that is created, fed and closed leaves nothing."""
    returns(observe, leak_probe("session"))


@check("memory.concurrent", kills=("leak_when_concurrent",))
def test_concurrent(observe: Observer, leak_probe: LeakProbe) -> None:
    """Requests that run at once leave nothing."""
    returns(observe, leak_probe("concurrent", max_tokens=2))


@check(
    "memory.thousand_requests",
    kills=(
        "leak_on_success",
        "history_grows",
        "leak_in_batch",
        "leak_in_failed_batch",
        "leak_at_stop",
        "leak_at_context_end",
        "leak_when_drawn",
        "leak_with_penalty",
        "leak_every_200th",
        "leak_every_200th_batch",
        "malformed_keeps_descriptor",
        "malformed_late_keeps_file",
        "leak_when_callback_raises",
        "leak_at_reset",
        "leak_in_trace",
        "leak_in_refused_text",
    ),
)
def test_thousand_requests(observe: Observer, leak_probe: LeakProbe, engine: Engine) -> None:
    """Requests of every kind, ended in every way, leave nothing: a thousand of each, or what time allows."""
    own = isinstance(getattr(engine, "model", None), Model)  # its code is one on every model: a small one
    report = leak_probe("requests", vary=False, **({"model": SMALL} if own else {}))
    returns(observe, report)
    made = report.kinds
    if own and len(made) < len(KINDS):
        raise Inconclusive("a kind of call could not be made", got=", ".join(KINDS.keys() - made.keys()))
    fewest, windows = min(made.values(), default=0), report.seen[0].of or 1
    if own and fewest < REQUESTS:
        raise Inconclusive("too few requests", expected=f"{REQUESTS} of each kind", got=fewest)
    observe.metric("requests of each kind", fewest, at_least=1)
    observe.say(
        f"{sum(made.values())} calls of {len(made)} kinds ({', '.join(made)}): no ledger kept growing; "
        f"one that grows in one call of {max(1, fewest // windows)} of a kind would have been seen"
    )


@check("memory.counters", kills=("memory_constant",), needs=(Capability.MEMORY, Capability.SESSIONS))
def test_counters(observe: Observer, engine: Engine) -> None:
    """What the engine reports moves with a session and is back at its idle value after it."""
    idle = dict(engine.memory())
    session = engine.session()
    try:
        session.feed([0])  # the one id that every vocabulary has
        during = dict(engine.memory())
    finally:
        session.close()
    after = dict(engine.memory())
    counters = [name for name in idle if name != "process"]
    observe.saw(2 * len(counters), oracle="its own readings with a session open and without")
    moved = [name for name in counters if during[name] > idle[name]]
    observe.expect(
        bool(moved), f"memory: {', '.join(counters)} read the same with a session open: a constant"
    )
    stuck = [f"{name} {after[name] - idle[name]:+d}" for name in counters if after[name] != idle[name]]
    observe.expect(not stuck, f"memory: not back at idle after the session was closed: {', '.join(stuck)}")
    observe.say(f"{', '.join(moved)} rose by {during[moved[0]] - idle[moved[0]]} B and went back to idle")


@check("memory.probe_sees", kills=("probe_blind",))
def test_probe_sees(observe: Observer, leak_probe: LeakProbe, pytestconfig: pytest.Config) -> None:
    """The probe finds 16 bytes leaked in every 8th call of a library, and nothing in a sound one."""
    _, *faults = str(pytestconfig.getoption("prill_engine")).split(FAULT)
    ambient = "".join(FAULT + name for name in faults)
    leaky = leak_probe("success", engine=f"control:leak=block,every=8{ambient}", vary=False)
    sound = leak_probe("success", engine=f"control:noise=churn{ambient}", vary=False)
    for name, report in (("leaking control", leaky), ("sound control", sound)):
        observe.note(**{name: noted(report)})
        if report.verdict is LeakVerdict.INCONCLUSIVE:
            raise Inconclusive(report.sentence)
    observe.saw(2, oracle="what the control library was asked to leak")
    found = [judged.ledger for judged in leaky.leaks]
    observe.expect(
        set(found) == {"host"}, f"the leaking library: expected a host leak, got {found or 'none'}"
    )
    observe.expect(sound.verdict is LeakVerdict.CLEAN, f"the sound library: {sound.sentence}")
    observe.say(f"leaking: {leaky.sentence}; sound: {sound.sentence}")
