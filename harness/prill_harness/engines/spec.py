"""Engine specs and device names, taken apart and checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from prill_runtime.errors import UsageError

FAULT = "+fault:"
ORACLE = "numpy64"
"""The engine that judges the others."""


@dataclass(frozen=True)
class EngineSpec:
    """`NAME[:ARGUMENT][+fault:FAULT]...`, parsed here and nowhere else."""

    name: str
    argument: str
    faults: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises UsageError if the name or a fault is empty."""
        base, *faults = text.split(FAULT)
        name, _, argument = base.partition(":")
        if not name or not all(faults):
            raise UsageError(
                "engine spec is incomplete",
                where=repr(text),
                expected="NAME[:ARGUMENT][+fault:FAULT]",
                got=repr(text),
            )
        return cls(name, argument, tuple(faults))


IN_ARENA = ("cuda", "emu")  # engines whose memory is an arena on a device


def with_budget(specs: Sequence[str], size: str) -> list[str]:
    """The specs, with every engine on a device limited to `size` of its memory, such as "2GiB".

    Raises:
        UsageError: none of them is on a device.
    """
    parsed = [EngineSpec.parse(spec) for spec in specs]
    if not any(spec.name in IN_ARENA for spec in parsed):
        raise UsageError(
            "no engine has device memory",
            where="--vram-budget",
            expected=f"an --engine of {' or '.join(IN_ARENA)}",
            got=", ".join(specs) or "none",
        )
    limited = []
    for text, spec in zip(specs, parsed, strict=True):
        argument = ",".join(filter(None, (spec.argument, f"budget={size}")))
        whole = FAULT.join((f"{spec.name}:{argument}", *spec.faults))
        limited.append(whole if spec.name in IN_ARENA else text)
    return limited


def check_device(name: str) -> None:
    """Refuse a device that no cell can have.

    Raises:
        UsageError: neither cpu nor cuda, with or without a number.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError("unknown device", expected="cpu, cuda or cuda:N", got=repr(name))


def check_judged(spec: str, oracle: str = ORACLE) -> None:
    """Refuse to judge an engine by itself. A planted fault or an argument does not make it another engine:
    whatever they leave unchanged would be compared with itself.

    Raises:
        UsageError: engine and oracle are the same.
    """
    if EngineSpec.parse(spec).name == EngineSpec.parse(oracle).name:
        raise UsageError(
            "an engine is never its own oracle",
            where=repr(spec),
            expected=f"another engine than {oracle}",
            got=repr(spec),
            hint=f"judge it by another with prill bisect --engine {spec} --against ENGINE",
        )
