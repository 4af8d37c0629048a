"""Every error prill raises on purpose, each one sentence: what, where, expected, got, and what to do.

PrillError                     exit 3  the harness itself broke
├── UsageError                 exit 4  the caller asked for something that cannot be
│   ├── InvalidParameter               an argument of a call is out of range
│   ├── ModelFileError                 a model file is malformed, truncated or inconsistent
│   ├── UnsupportedModel               a sound file of an architecture, type or tokenizer prill does not know
│   ├── DescriptionError               an installed description of an architecture is broken
│   └── PolicyError                    a gate or plan file is invalid
│       ├── ChecklistError             a checklist is
│       ├── WaiverError                a file of waivers is
│       ├── IncidentError              an entry of the incident log is
│       ├── KillsError                 a kill matrix is
│       ├── LedgerError                a ledger is, or ledgers do not belong together
│       └── VerdictError               a verdict is, or it is not of the ledger beside it
├── NothingSelected            exit 5  the selection matched nothing
├── EngineError                exit 1  the engine under test failed while it worked
│   ├── ContextLengthExceeded          more positions asked for than the context holds
│   ├── ProcessLost                    its process ended, hangs, or says what is no answer
│   ├── Reported                       a failure of a kind that the engine names: out of memory, device lost …
│   └── NotANumber                     finite input gave NaN or infinity
└── Inconclusive               exit 10 nothing could be observed
    └── MissingCapability              the engine does not offer what the check needs
"""

from __future__ import annotations


class PrillError(Exception):
    """Base of the hierarchy: subclasses carry a noun and an exit code, the base writes the sentence.

    Args:
        what: the fact, as a clause ("string runs past the end of the file").
        where: file, offset, stage or argument it concerns.
        expected: what would have been right.
        got: what was found.
        hint: what to do about it.
    """

    noun = "internal error"
    exit_code = 3

    def __init__(
        self, what: str, *, where: str = "", expected: object = None, got: object = None, hint: str = ""
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.expected, self.got, self.hint = what, where, expected, got, hint

    def __str__(self) -> str:
        place = f" in {self.where}" if self.where else ""
        facts = [
            f"{word} {value}"
            for word, value in (("expected", self.expected), ("got", self.got))
            if value is not None
        ]
        tail = f": {', '.join(facts)}" if facts else ""
        hint = f"; {self.hint}" if self.hint else ""
        sentence = f"{self.noun}{place}: {self.what}{tail}{hint}"
        return sentence.encode("utf-8", "backslashreplace").decode("utf-8").replace("\n", "\\n")


class UsageError(PrillError):
    """The request cannot be carried out as it was made."""

    noun = "usage error"
    exit_code = 4


class OutputError(UsageError):
    """What was to be written cannot be."""

    noun = "output error"


class InvalidParameter(UsageError):
    """One argument is out of its range."""

    noun = "invalid parameter"


class ModelFileError(UsageError):
    """The file breaks the GGUF format or contradicts itself."""

    noun = "invalid model file"


class UnsupportedModel(UsageError):
    """The file is sound, but names an architecture, type or tokenizer that prill does not implement."""

    noun = "unsupported model"


class DescriptionError(UsageError):
    """What another package installed to describe an architecture is broken, or there are two of them."""

    noun = "invalid description"


class PolicyError(UsageError):
    """What a gate decides by is invalid: its policy, or one of the files that its subclasses name."""

    noun = "invalid policy"


class ChecklistError(PolicyError):
    """A checklist file is invalid."""

    noun = "invalid checklist"


class WaiverError(PolicyError):
    """A file of waivers is invalid."""

    noun = "invalid waivers"


class IncidentError(PolicyError):
    """An entry of the incident log is invalid."""

    noun = "invalid incident"


class KillsError(PolicyError):
    """A kill matrix cannot be read."""

    noun = "invalid kill matrix"


class LedgerError(PolicyError):
    """A ledger cannot be read, or several contradict one another."""

    noun = "invalid ledger"


class VerdictError(PolicyError):
    """A verdict cannot be read, or was not computed from the ledger beside it."""

    noun = "invalid verdict"


class NothingSelected(PrillError):
    """A selection of checks, cells or items came out empty."""

    noun = "nothing selected"
    exit_code = 5


class EngineError(PrillError):
    """The engine under test failed while it worked."""

    noun = "engine failed"
    exit_code = 1


class ContextLengthExceeded(EngineError):
    """More positions were asked for than the context holds."""

    noun = "context length exceeded"


class ProcessLost(EngineError):
    """The engine's process ended in a call, or was ended because it hung or said what is no answer.

    Attributes:
        crashed: whether a signal ended it, rather than the engine itself.
    """

    crashed = False


class Reported(EngineError):
    """A failure of a kind that the engine itself names, such as `out_of_memory`.

    Attributes:
        kind: as in prill_engine.h, in lower case and without its prefix.
        retriable: whether the same request may work later.
    """

    def __init__(self, kind: str, what: str, *, where: str = "", **facts: str) -> None:
        super().__init__(what, where=where, **facts)
        self.kind, self.noun = kind, kind.replace("_", " ")
        self.retriable = kind == "out_of_memory"


class NotANumber(EngineError):
    """Finite input produced NaN or infinity."""

    noun = "not a number"


class Inconclusive(PrillError):
    """Nothing could be observed, so nothing may be claimed."""

    noun = "inconclusive"
    exit_code = 10


class MissingCapability(Inconclusive):
    """The engine does not offer what the check needs."""

    noun = "missing capability"
