"""The cases that the probe is examined on: known leaks, clean engines, and the required verdicts."""

from __future__ import annotations

import msgspec

from prill_harness.leaks.reports.report import LeakVerdict, Probe

TINY = "fixture:llama-tiny"
NONE = "none"


class Known(msgspec.Struct, frozen=True):
    """One case: an engine that is known to leak or to be clean.

    Attributes:
        ledgers: those that must show the leak; empty: none may.
        verdicts: those that are correct.
        function: the one that a stack must name; empty: no stack is required.
        says: words in the sentence. most_calls: of a run, if not 0. anywhere: any ledger may show it.
        runs: number of runs, each with another seed, in a full examination; quick: in a quick one.
    """

    name: str
    engine: str
    ledgers: tuple[str, ...] = ()
    verdicts: tuple[LeakVerdict, ...] = (LeakVerdict.LEAK,)
    path: str = "success"
    model: str = NONE
    function: str = ""
    runs: int = 1
    quick: int = 0
    says: str = ""
    most_calls: int = 0
    anywhere: bool = False

    def probe(self, seed: int) -> Probe:
        """The probe of one run."""
        engine = self.engine if self.model != NONE else f"{self.engine},seed={seed + 1}"
        return Probe(engine, self.model, self.path, timeout_s=120.0, stacks=False)


CLEAN_ONLY = (LeakVerdict.CLEAN,)
EITHER = (LeakVerdict.CLEAN, LeakVerdict.INCONCLUSIVE)


def _block(size: int, every: int, noise: str = "quiet", **rest: object) -> Known:
    name = f"{size} bytes, every {'call' if every == 1 else f'{every}th call'}"
    name += "" if noise == "quiet" else f", amid {noise}"
    engine = f"control:leak=block,size={size},every={every},noise={noise}"
    case = Known(name, engine, ("host",), function="control_leak_block")
    return msgspec.structs.replace(case, **rest)


# The requirement: 16 bytes in every 8th call are found in 50 calls, in 60 of 60 runs.
BAR = tuple(
    _block(16, 8, noise, runs=20, quick=1, most_calls=50, function="") for noise in ("quiet", "churn", "pool")
)

PLANTED = (
    *(
        _block(size, every, quick=int((size, every) == (1, 8)))
        for size in (1, 16, 64, 4096)
        for every in (1, 8)
    ),
    _block(64, 8, "pool"),
    _block(64, 8, "threads"),
    Known("a list that only grows", "control:leak=list,size=64", ("host",),
         function="control_grow_list", quick=1),
    Known("one buffer that only grows", "control:leak=buffer,size=64", ("host",),
         function="control_grow_buffer"),
    Known("a mapping in every call", "control:leak=mapping,size=4096", ("host",),
         function="control_leak_mapping"),
    Known("an own arena of mappings", "control:leak=arena,size=16384", ("host",),
         function="control_leak_arena"),
    Known("mappings behind libc's back", "control:leak=raw,size=65536", ("process",)),
    Known("a descriptor", "control:leak=descriptor", ("process",), says="descriptors"),
    Known("a thread", "control:leak=thread", ("process",), says="threads"),
    Known("only on error", "control:leak=block,on=error", ("host",), path="error", quick=1),
    Known("only on cancel", "control:leak=block,on=cancel", ("host",), path="cancel"),
    Known("only at unload", "control:leak=block,on=load", ("host",), path="load"),
    Known("only in a session's end", "control:leak=block,on=session", ("host",), path="session"),
    Known("only on the 3rd failed allocation", "control:on=third_failure", ("host",), path="load", quick=1,
         says="allocation 3 "),
    Known("on any failed allocation", "control:on=any_failure", ("host",), path="load"),
    Known("a block freed twice", "control:leak=double_free", (), (LeakVerdict.BROKEN,), says="double free"),
    Known("a tracker that reports a constant", "control:tells=constant", (), (LeakVerdict.INCONCLUSIVE,),
         says="tracks nothing"),
    *(
        Known(f"numpy: {fault}", f"numpy+fault:{fault}", ledgers, path=path, model=TINY, quick=quick)
        for fault, path, ledgers, quick in (
            ("leak_on_success", "success", ("host",), 0),
            ("leak_every_eighth", "success", ("host",), 0),
            ("leak_on_error", "error", ("host",), 0),
            ("leak_on_cancel", "cancel", ("host",), 0),
            ("leak_on_unload", "load", ("host",), 0),
            ("failed_load_leaks", "load", ("host",), 0),
            ("session_cache_kept", "session", ("host",), 0),
            ("leak_mapping", "success", ("host",), 0),
            ("leak_descriptor", "success", ("process",), 0),
            ("leak_thread", "success", ("process",), 0),
            ("leak_when_concurrent", "concurrent", ("host",), 0),
        )
    ),
    Known("numpy: history_grows", "numpy+fault:history_grows", ("python",), model=TINY,
         function="memory.py"),
)  # fmt: skip

CLEAN = (
    Known("quiet", "control:noise=quiet", (), CLEAN_ONLY, runs=10, quick=1),
    Known("allocation churn", "control:noise=churn", (), CLEAN_ONLY, runs=45, quick=1),
    Known("worker pool, cross-thread frees", "control:noise=pool", (), CLEAN_ONLY, runs=40, quick=1),
    Known("threads that come and go", "control:noise=threads", (), CLEAN_ONLY, runs=35, quick=1),
    Known("a cache of 16, entered by every call", "control:ring=16", (), CLEAN_ONLY, runs=15),
    Known("a cache of 30, entered by every call", "control:ring=30,noise=churn", (), CLEAN_ONLY, runs=15),
    Known("a cache of 64 prompts", "control:prompts=64", (), CLEAN_ONLY, runs=15),
    Known("numpy on llama-tiny", "numpy", (), CLEAN_ONLY, model=TINY, runs=8, quick=1),
    Known("numpy64 on llama-tiny", "numpy64", (), CLEAN_ONLY, model=TINY, runs=8),
    *(
        Known(f"{engine}: {path}", engine, (), CLEAN_ONLY, path=path, model=TINY, runs=2)
        for engine in ("numpy", "numpy64")
        for path in ("error", "cancel", "load", "session", "concurrent")
    ),
)  # fmt: skip

UNDECIDED = (
    Known("a cache of 5000, entered by every call, that never fills", "control:ring=5000", (),
         (LeakVerdict.INCONCLUSIVE,), runs=5, quick=1, says="has not filled"),
    Known("a silent cache of 5000 prompts that never fills", "control:prompts=5000,tells=no", (),
         (LeakVerdict.INCONCLUSIVE,), runs=2, says="distinct prompts"),
    Known("as many live blocks as chance wills", "control:noise=ragged", (), EITHER, runs=10),
)  # fmt: skip
