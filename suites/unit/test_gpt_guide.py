"""The guide to GPT-2 and gpt-oss: its commands are followed, and each of its numbers can be got wrong."""

from __future__ import annotations

import doctest
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prill_harness.faults.catalogue import catalogue
from prill_harness.planting import faults
from prill_harness.planting.faults import Fault
from prill_runtime.ops.numpy import NumpyBackend

from .converted import FILE
from .test_adapter_guide import SESSION, expected, follow, shell, steps

__all__ = ["shell"]
ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "GPT_INTEGRATION_GUIDE.md").read_text("utf-8")
OPS = "## 2. One number for each operation"


@dataclass(frozen=True)
class Section:
    """A heading, and what is said to an interpreter below it."""

    title: str
    examples: tuple[doctest.Example, ...]

    def wrong(self, names: dict[str, Any]) -> list[str]:
        """Run it with these names, to which it adds its own; the sources of what came out otherwise."""
        found: list[str] = []

        class Quiet(doctest.DocTestRunner):
            def report_failure(self, out: Any, test: Any, example: doctest.Example, got: str) -> None:
                found.append(example.source)

            def report_unexpected_exception(self, out: Any, test: Any, example: Any, info: Any) -> None:
                found.append(f"{example.source}{info[1]}")

        test = doctest.DocTest(list(self.examples), {}, self.title, None, None, None)
        test.globs = names
        Quiet(verbose=False).run(test, clear_globs=False)
        return found


def sections() -> list[Section]:
    """Those of the second chapter, its introduction first."""
    chapter = GUIDE[GUIDE.index(OPS) : GUIDE.index("\n## 3.")]
    parser, found = doctest.DocTestParser(), []
    for part in re.split(r"^###? ", chapter, flags=re.MULTILINE)[1:]:
        blocks = re.findall(rf"^```{SESSION}\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
        examples = [example for block in blocks for example in parser.get_examples(block)]
        found.append(Section(part.splitlines()[0], tuple(examples)))
    return found


SECTIONS = {section.title: section for section in sections()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the guide is followed, with the file that its first command copies."""
    place = tmp_path_factory.mktemp("gpt")
    shutil.copy(FILE, place / "gpt-oss.gguf")
    return place


@pytest.fixture(scope="module")
def names(folder: Path) -> dict[str, Any]:
    """All that the guide has defined by its end, with what came out otherwise under "wrong"."""
    known: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        wrong = [source for section in SECTIONS.values() for source in section.wrong(known)]
    return {**known, "wrong": wrong}


def test_the_guide_does_what_it_shows(shell: dict[str, str], tmp_path: Path) -> None:
    """Every file and command, in order: the exit code, and all that is printed but times and progress."""
    follow(GUIDE, tmp_path, {**shell, "PRILL": str(ROOT)})


def test_every_number_is_as_shown(names: dict[str, Any]) -> None:
    """All examples, in order."""
    assert names["wrong"] == []


TWICE = {"LayerNorm", "GELU", "RMSNorm", "YaRN", "Windows", "Sinks", "Router", "Clamped SwiGLU", "Experts",
         "An MXFP4 block"}  # fmt: skip


@pytest.mark.parametrize("title", sorted(TWICE))
def test_arithmetic_comes_first_and_the_op_agrees(title: str) -> None:
    """One number is computed without prill and then by it, and the guide shows the same for both."""
    shown = [example for example in SECTIONS[title].examples if example.source.startswith("show(")]
    first, second = shown
    assert first.want == second.want
    assert "ops." not in first.source
    assert "layouts." not in first.source


def changed(op: str, mistake: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """An op of the oracle's with a mistake: `mistake(original, *arguments, **named)`."""
    original = getattr(NumpyBackend, op)

    def wrong(self: Any, *given: Any, **named: Any) -> Any:
        return mistake(lambda *a, **n: original(self, *a, **n), *given, **named)

    return lambda patch: patch.setattr(NumpyBackend, op, wrong)


def without(*dropped: str) -> Callable[..., Any]:
    """The op, without some of its options."""
    return lambda o, *given, **named: o(*given, **{k: v for k, v in named.items() if k not in dropped})


def set_to(**other: Any) -> Callable[..., Any]:
    """The op, with other values of options."""
    return lambda o, *given, **named: o(*given, **{**named, **other})


def highest_id(o: Any, logits: Any, **named: Any) -> Any:
    return o(logits[:, ::-1], **named)[:, ::-1]


def bounds_rounded(o: Any, *given: Any, yarn: Any, **named: Any) -> Any:
    return o(*given, yarn=yarn._replace(truncate=True), **named)


def one_too_late(o: Any, table: Any, ids: Any) -> Any:
    return o(table, (np.asarray(ids) + 1) % len(table))


MISTAKES: dict[str, tuple[str, str | Callable[[pytest.MonkeyPatch], None]]] = {
    "its mean stays": ("LayerNorm", "layer_norm_mean_kept"),
    "it has no bias": ("LayerNorm", "layer_norm_no_bias"),
    "n - 1": ("LayerNorm", "variance_n_minus_1"),
    "by erf": ("GELU", "gelu_erf"),
    "by a sigmoid": ("GELU", "gelu_quick"),
    "rows one too late": ("Where things lie in GPT-2", changed("embed", one_too_late)),
    "the mean goes": ("RMSNorm", "rms_mean_subtracted"),
    "bounds rounded": ("YaRN", changed("rope", bounds_rounded)),
    "cosines as they are": ("YaRN", changed("rope", set_to(scale=1.0))),
    "pairs of neighbours": ("YaRN", changed("rope", set_to(layout="norm"))),
    "127 keys": ("Windows", "window_off_by_one"),
    "no window": ("Windows", changed("attention", without("window"))),
    "no sink": ("Sinks", changed("attention", without("sinks"))),
    "tie by highest id": ("Router", changed("route", highest_id)),
    "softmax over all": ("Router", changed("route", set_to(normalised=False))),
    "top 2": ("Router", changed("route", set_to(used=2))),
    "no limit": ("Clamped SwiGLU", changed("swiglu_clamped", set_to(limit=1e9))),
    "alpha 1": ("Clamped SwiGLU", changed("swiglu_clamped", set_to(alpha=1.0))),
    "1 not added": ("Clamped SwiGLU", changed("swiglu_clamped", lambda o, g, u, **n: o(g, u - 1, **n))),
    "bias dropped": ("Experts", changed("expert_linear", without("bias"))),
    "experts swapped": ("Experts", changed("mix", lambda o, x, routed: o(x[:, ::-1], routed))),
    "nibbles in turn": ("An MXFP4 block", "mxfp4_nibbles_interleaved"),
    "scale off by one": ("An MXFP4 block", "e8m0_scale_off_by_one"),
    "digits in fours": ("Words and marks", "digits_in_fours"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_number_changes_with_the_mistake_that_it_warns_of(
    mistake: str, names: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something in the section comes out otherwise; without the mistake nothing does."""
    title, how = MISTAKES[mistake]
    monkeypatch.chdir(folder)
    planted: tuple[Fault, ...] = ()
    if isinstance(how, str):
        planted = (catalogue()[how],)
    else:
        how(monkeypatch)
    with faults.only(planted):
        assert SECTIONS[title].wrong(dict(names))
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert not SECTIONS[title].wrong(dict(names))


def test_every_op_has_a_mistake() -> None:
    """Of each section that computes one number twice."""
    assert {title for title, _ in MISTAKES.values()} >= TWICE


def test_the_extraction_is_not_vacuous() -> None:
    """There are as many commands and examples as the guide has, and outcomes of each kind."""
    found = list(steps(GUIDE))
    assert [step.file for step in found if step.file] == ["gates.toml"]
    commands = [step for step in found if not step.file]
    assert len(commands) == GUIDE.count("\n$ ") >= 10
    assert {step.exit_code for step in commands} == {0, 1, 4}
    assert any(step.text.startswith("prill gate") and "passed" in step.shown for step in commands)
    assert sum(len(section.examples) for section in SECTIONS.values()) == GUIDE.count("\n>>> ") >= 60
    assert not expected("gate gpt passed: …\n").fullmatch("gate gpt failed: 1\n")


def test_the_numbers_of_yarn_are_those_of_transformers() -> None:
    """As its code gives them, in float64, for the published configuration."""
    shown = next(example.want for example in SECTIONS["YaRN"].examples if example.source.startswith("show("))
    published = [0.727556815849, 1.34654250376, 1.34657359028, 1.16117581982, 1.04748554267, 1.34657358966,
                 0.208272391014, -1.1243458231, 1.34657205155]  # fmt: skip
    assert shown == f"{np.round(published, 6).tolist()}\n"
