"""What suites are written with: the `check` marker, and the observer through which a check judges."""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from prill_harness.engines.base import Capability
from prill_harness.records.evidence import Metric, builtin
from prill_harness.records.sources import judging

F = TypeVar("F", bound=Callable[..., object])


class CheckFailed(AssertionError):
    """A check saw something wrong; its message is the one sentence the verdict prints."""


class Observer:
    """Collects what one check saw; a check that never calls `saw` with an oracle cannot pass."""

    def __init__(self) -> None:
        self.observed = 0
        self.oracle = ""
        self.seed: int | None = None
        self.metrics: list[Metric] = []
        self.digests: dict[str, str] = {}
        self.detail: dict[str, Any] = {}
        self.sentence = ""

    def saw(self, count: int, *, oracle: str) -> None:
        """Record that `count` values were compared with `oracle` (what it is and where it comes from)."""
        self.observed += int(count)
        self.oracle = oracle

    def metric(
        self,
        name: str,
        value: float,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        equals: float | None = None,
        otherwise: str = "",
    ) -> None:
        """Record a figure; out of bound, fail with `otherwise` or with a sentence made from the figures.

        Raises:
            CheckFailed: the value is not finite, or out of its bound.
            ValueError: a bound that is not finite, so that no value could exceed it.
        """
        bound, relation = next(
            ((b, r) for b, r in ((at_most, "<="), (at_least, ">="), (equals, "==")) if b is not None),
            (None, "<="),
        )
        if bound is not None and not math.isfinite(bound):
            raise ValueError(f"{name} has the bound {bound}, which decides nothing")
        finite = float(value) if math.isfinite(value) else None
        limit = None if bound is None else float(bound)
        metric = Metric(builtin(name), finite, limit, relation)  # type: ignore[arg-type]
        self.metrics.append(metric)
        if not metric.holds:
            wanted = "a finite value" if limit is None else f"{relation} {limit:.6g}"
            raise CheckFailed(otherwise or f"{name}: expected {wanted}, got {value:.6g}")

    def expect(self, condition: bool, otherwise: str, **detail: object) -> None:
        """Fail with the sentence `otherwise` unless the condition holds; `detail` goes into the evidence."""
        if not condition:
            self.fail(otherwise, **detail)

    def fail(self, sentence: str, **detail: object) -> None:
        self.note(**detail)
        raise CheckFailed(sentence)

    def note(self, **detail: object) -> None:
        """Keep material for the report (builtins; arrays become lists)."""
        self.detail.update({k: builtin(v) for k, v in detail.items()})

    def say(self, sentence: str) -> None:
        """Set the sentence of a passing check: what was seen, with figures."""
        self.sentence = sentence


def check(
    name: str, *, kills: tuple[str, ...], needs: tuple[Capability, ...] = (), oracle: str = ""
) -> Callable[[F], F]:
    """Mark a pytest function as a check.

    Args:
        name: `suite.name`, unique; checklists refer to it.
        kills: planted faults that it is known to find; at least one.
        needs: engine capabilities without which it is inconclusive.
    """
    if not kills:
        raise ValueError(f"{name} names no planted fault that it kills")
    return pytest.mark.prill_check(name=name, kills=kills, needs=needs, oracle=oracle)


def content_hash(function: Callable[..., object]) -> str:
    """sha256 (hex) over the check's module and all code of the harness that judges for it."""
    digest = hashlib.sha256(function.__qualname__.encode())
    module = sys.modules.get(function.__module__)  # a decorated function may not know its own file
    own = Path(getattr(module, "__file__", None) or inspect.getfile(inspect.unwrap(function)))
    for name, source in judging(own).items():
        digest.update(f"\0{name}\0".encode() + hashlib.sha256(source).digest())
    return digest.hexdigest()
