"""One step of judging an engine: its result, and what becomes of errors on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from prill_harness.engines.base import Engine
from prill_harness.engines.embedded import Embedded, NumPy64
from prill_harness.numbers.lanes import Figures
from prill_harness.planting import faults
from prill_harness.records.evidence import Status
from prill_harness.tokens.golden_pack import Golden
from prill_harness.tokens.sides import of_another_file
from prill_runtime.errors import EngineError, Inconclusive, InvalidParameter


@dataclass(frozen=True)
class StepResult:
    """The result of one step.

    Attributes:
        observed: values compared; a result that observed none is never ok.
        inconclusive: nothing was wrong, but something could not be seen; the sentence says what.
        figures, bounds: of the teacher-forced step.
        detail: what a report needs to show the first divergence; builtins only.
    """

    step: str
    ok: bool
    sentence: str
    observed: int = 0
    inconclusive: bool = False
    figures: Figures | None = None
    bounds: Figures | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ok and (self.inconclusive or self.observed < 1):
            raise ValueError(f"{self.step} cannot be ok: observed {self.observed}, {self.sentence}")

    @property
    def status(self) -> Status:
        if self.inconclusive:
            return Status.INCONCLUSIVE
        return Status.PASSED if self.ok else Status.FAILED


def step(name: str) -> Callable[[Callable[..., StepResult]], Callable[..., StepResult]]:
    """Turn what the engine cannot do or fails at into the step's result; open an oracle if none is given.

    With a golden of another file nothing is compared; the result then says so of the golden.
    """

    def wrap(body: Callable[[Engine, Golden, Embedded], StepResult]) -> Callable[..., StepResult]:
        def run(engine: Engine, golden: Golden, oracle: Embedded | None = None) -> StepResult:
            with ExitStack() as stack:
                judge = oracle or stack.enter_context(oracle_for(engine))
                if (doubt := of_another_file(golden, judge)) is not None:
                    return StepResult("golden", False, doubt.sentence, detail={"side": doubt.side})
                try:
                    return body(engine, golden, judge)
                except Inconclusive as missing:
                    # Raised again, the error would add that word again.
                    sentence = str(missing).removeprefix(f"{Inconclusive.noun}: ")
                    return StepResult(name, False, sentence, inconclusive=True)
                except (EngineError, InvalidParameter) as error:
                    return StepResult(name, False, f"the engine stopped: {error}")

        run.__doc__ = body.__doc__
        run.__name__ = body.__name__
        return run

    return wrap


def oracle_for(engine: Engine) -> Embedded:
    """The float64 oracle on the model that the engine has open."""
    oracle = faults.scoped(lambda: NumPy64.open("", engine.info.model), ())
    assert isinstance(oracle, NumPy64)
    return oracle
