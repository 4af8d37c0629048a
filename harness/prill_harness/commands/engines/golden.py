"""`prill golden`: record or show a model's golden, or compare an engine with it step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prill_harness.commands.shared.declare import SPECS, quoted, vram_option
from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console
from prill_harness.records.evidence import EXIT_CODES, Status, badness, builtin
from prill_runtime.errors import UsageError

if TYPE_CHECKING:
    from prill_harness.tokens.golden import Golden

SHOWN = 160  # characters of a continuation to show


@click.group(name="golden", epilog="\b\nExample:\n  prill golden show fixture:llama-tiny")
def command() -> None:
    """Record, show and compare golden tokens."""


@declare(parent=command, name="record", example="prill golden record model.gguf -o model.golden.json")
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Default: MODEL.golden.json."
)
@click.option("--keep", is_flag=True, help="Where gate, run and show look for it: in the cache.")
@click.option("--tokens", type=click.IntRange(min=1), default=300, show_default=True, help="Ids per prompt.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="May be repeated.")
def record(
    console: Console, model: str, output: Path | None, keep: bool, tokens: int, prompts: tuple[str, ...]
) -> int:
    """Run the float64 oracle over prompts and record MODEL's golden."""
    from prill_harness.engines.models import resolve_model
    from prill_harness.tokens import golden

    if keep:
        return _keep(console, model, asked=bool(output or prompts or tokens != golden.TOKENS))
    path = resolve_model(model)
    target = output or Path(f"{path.name}.golden.json")
    console.remark(f"recording {target}")
    with console.progress(1, "recording") as bar:
        made = golden.record(
            path,
            prompts or golden.prompts_for(model),
            tokens=tokens,
            progress=_steps(bar),
            name=model.split(":")[1] if model.startswith("fixture:") else path.stem,
        )
    for sentence in dict.fromkeys(_remarks(path, made)):
        console.remark(sentence)
    golden.save(made, target)
    count = sum(len(p.tokens) for p in made.prompts)
    console.emit({"file": str(target), "prompts": len(made.prompts), "tokens": count, **_summary(made)})
    console.line(f"recorded {count} tokens of {len(made.prompts)} prompts to {target}")
    return 0


def _keep(console: Console, model: str, *, asked: bool) -> int:
    """Record the golden that commands look up, which is always recorded with the same settings."""
    from prill_harness.engines.models import fixture_name, resolve_model
    from prill_harness.tokens import golden

    if asked or fixture_name(model) is not None:
        got = "a packaged model, which has one" if not asked else "others beside it"
        raise UsageError("one golden is kept", where="--keep", expected="a file and no other option", got=got)
    made, target = _golden(console, model), golden.kept_at(resolve_model(model))
    console.emit({"file": str(target), "prompts": len(made.prompts), **_summary(made)})
    console.line(f"kept {target}")
    return 0


@declare(parent=command, name="show", example="prill golden show fixture:llama-tiny:q4_k")
@click.argument("model")
def show(console: Console, model: str) -> int:
    """Show MODEL's golden: prompts, continuations, margin profile, noise floors.

    A user's file is recorded on first use.
    """
    made = _golden(console, model)
    texts = _texts(model, made)
    console.emit(
        {
            **_summary(made),
            "prompts": [
                {
                    "text": p.text,
                    "ids": p.ids,
                    "tokens": p.tokens,
                    "continuation": text,
                    "first_eos": p.first_eos,
                }
                for p, text in zip(made.prompts, texts, strict=True)
            ],
        }
    )
    mark = made.fingerprint
    console.line(f"{made.name} {made.type}, oracle {mark.oracle}, model sha256 {mark.model_sha256[:16]}")
    for number, (prompt, text) in enumerate(zip(made.prompts, texts, strict=True)):
        console.line()
        console.line(f"prompt {number}, {len(prompt.ids)} ids: {quoted(prompt.text)}")
        console.line(
            f"  {len(prompt.tokens)} tokens: {quoted(text[:SHOWN])}{'...' if len(text) > SHOWN else ''}"
        )
    console.line()
    console.line(f"margins between the best two logits, {made.margins.positions} positions")
    console.table(("quantile", "margin"), [(q, f"{v:.4g}") for q, v in made.margins.quantiles.items()])
    console.line()
    console.table(("margin at most", "positions"), list(made.margins.below.items()))
    console.line()
    figures = [name for name in asdict(next(iter(made.floors.values()))) if name != "buckets"]
    rows = [(lane, *(f"{getattr(f, name):.4g}" for name in figures)) for lane, f in made.floors.items()]
    console.table(("noise floor", *figures), rows)
    return 0


@declare(
    parent=command,
    name="compare",
    example="prill golden compare --engine numpy --model fixture:gpt2-tiny",
    judges=True,
)
@click.option("--engine", default="numpy", show_default=True, help=f"{SPECS}.")
@vram_option
@click.option("--model", required=True, help="Path, or fixture:NAME[:TYPE].")
@click.option("--golden", "file", type=click.Path(path_type=Path, dir_okay=False), help="A recorded golden.")
def compare(console: Console, engine: str, model: str, file: Path | None) -> int:
    """Compare an engine with the golden: ids, configuration, logits, greedy and sampled tokens.

    Each step that fails stops the next. Exit code 1 when one failed, 10 when one saw nothing, 4 when the
    golden that was given is another model's.
    """
    from prill_harness.faults.opening import open_engine
    from prill_harness.numbers import lanes
    from prill_harness.stages.written import explained
    from prill_harness.tokens import golden, sides
    from prill_harness.tokens import judge as tokens
    from prill_harness.tokens.steps import oracle_for

    given = golden.load(file) if file else None
    with open_engine(engine, model) as opened, oracle_for(opened) as oracle:
        if given is not None:
            sides.refuse_another(given, oracle, where=str(file))
        findings = tokens.compare(opened, given or _golden(console, model), oracle)
        findings = [explained(finding, oracle) for finding in findings]
    console.emit({"engine": engine, "model": model, "findings": [_plain(f) for f in findings]})
    for finding in findings:
        console.line(
            f"{finding.step}: {finding.status.value}: {finding.sentence}", status=finding.status.value
        )
        if finding.figures is not None and finding.bounds is not None:
            rows = lanes.judged(finding.figures, finding.bounds)
            console.table(
                ("figure", "value", "bound"), [(n, f"{v:.4g}", f"{r} {b:.4g}") for n, v, b, r in rows]
            )
        if finding.status is Status.FAILED:
            _show(console, builtin(finding.detail))
    return EXIT_CODES[min((finding.status for finding in findings), key=badness, default=Status.FAILED)]


def _remarks(path: Path, made: Golden) -> Iterator[str]:
    """Remarks on a golden's prompts, and what prill assumes about the file."""
    from prill_runtime.gguf.file import open_gguf
    from prill_runtime.models.assumptions import assumptions, remarks
    from prill_runtime.tokenizer.load import load_tokenizer

    with open_gguf(path) as file:
        yield from (f"assumed {each}" for each in assumptions(file))
        tokenizer = load_tokenizer(file.metadata)
    for number, prompt in enumerate(made.prompts):
        yield from (f"prompt {number}: {each}" for each in remarks(tokenizer, prompt.text, prompt.ids))


def _steps(bar: Any) -> Callable[[int, int], None]:
    """A progress callback that reports every twentieth of the work."""

    def progress(done: int, total: int) -> None:
        bar.total = total
        if done == total or done % max(1, total // 20) == 0:
            bar.at(done, "recording the float64 oracle")

    return progress


def _golden(console: Console, model: str) -> Golden:
    from prill_harness.commands.shared import goldens
    from prill_harness.tokens import golden

    target = goldens.unrecorded(model)
    if target is not None:
        goldens.announce(console, model, target)
    with console.progress(1, "golden") as bar:
        return golden.golden_for(model, progress=_steps(bar))


def _texts(model: str, made: Golden) -> list[str]:
    """The continuations as text; needs the model's tokenizer."""
    from prill_harness.faults.opening import open_engine

    with open_engine("numpy", model) as engine:
        whole = [engine.detokenize([*p.ids, *p.tokens]) for p in made.prompts]
        heads = [len(engine.detokenize(p.ids)) for p in made.prompts]
    return [text[head:].decode("utf-8", "replace") for text, head in zip(whole, heads, strict=True)]


def _summary(made: Golden) -> dict[str, Any]:
    mark = made.fingerprint
    return {
        "name": made.name,
        "type": made.type,
        "model_sha256": mark.model_sha256,
        "oracle": mark.oracle,
        "versions": mark.versions,
        "margins": {
            "positions": made.margins.positions,
            "quantiles": made.margins.quantiles,
            "below": made.margins.below,
        },
        "floors": {lane: asdict(figures) for lane, figures in made.floors.items()},
    }


def _plain(finding: Any) -> dict[str, Any]:
    """A step's result as builtins."""
    plain: dict[str, Any] = builtin({**asdict(finding), "status": finding.status.value})
    return plain


def _show(console: Console, finding: Mapping[str, Any]) -> None:
    """Print a failed step's detail: facts as lines, lists of rows as tables."""
    for key, value in finding.items():
        if value in (None, "", [], {}):
            continue
        if isinstance(value, Mapping):
            _show(console, value)
        elif isinstance(value, Sequence) and not isinstance(value, str) and isinstance(value[0], Mapping):
            console.line(f"  {key.replace('_', ' ')}:")
            columns = list(value[0])
            console.table(columns, [[row.get(c, "") for c in columns] for row in value])
        else:
            console.line(f"  {key.replace('_', ' ')}: {value}")
