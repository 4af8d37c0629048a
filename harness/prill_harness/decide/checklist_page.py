"""Render docs/INTEGRATION_CHECKLIST.md: what each item means, and which command proves it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prill_harness.decide.checklist import Checklist, Item
from prill_harness.decide.explained import observes
from prill_harness.decide.templates import of_models, shown_id
from prill_harness.engines.features import having
from prill_harness.run import reproduce

INTRO = """\
# Integration checklist

What has to be true of an engine before it may be merged, item by item: what the item means, what its checks
look at, and the command that proves it. An item is *proven* when each of its checks passed in every cell that
carries it, *failed* when one failed, and *unproven* in every other case: what nobody looked at is not done.

- `prill gate` proves them all at once, and decides;
- `prill checklist` then shows each item with its evidence, `prill checklist llama` those of one architecture;
- `ARCH` stands for an architecture: each has items of its own, `llama.tokens.exact`, `gpt2.tokens.exact`, as
  far as its models have the features that an item speaks of (`prill inspect MODEL` shows them);
- the commands below prove one item alone, on a packaged model. Put `--engine` and `--model` of your own in;
- `prill explain CHECK` says which mistakes a check is known to find.

Severities: **critical**, **high**, **medium**, **low**. Which of them hold a gate shut is the policy's to say
(`blocks_at`); a critical item that is unproven always does.

This page is written by the command itself, from `suites/prill_suites/checklists`:

```
prill checklist --docs docs/INTEGRATION_CHECKLIST.md
```
"""


def render(checklists: Sequence[Checklist]) -> str:
    """The page: a section for each list, in it one for each item, worst severity first."""
    lines = [INTRO]
    for checklist in checklists:
        items = sorted(checklist.items, key=lambda item: (item.severity.rank, item.id))
        lines += [f"## {checklist.title}", "", f"`prill checklist {checklist.id}`: {len(items)} items.", ""]
        for item in items:
            lines += [*_item(checklist, item), ""]
    return "\n".join(lines)


def _item(checklist: Checklist, item: Item) -> Iterator[str]:
    warning = "; a failure is a warning" if item.warns else ""
    only = f", of models {of_models(item)}" if of_models(item) else ""
    yield f"### {item.title}"
    yield ""
    yield f"`{shown_id(checklist, item)}`, **{item.severity}**{warning}{only}. Why: {item.why}."
    yield ""
    if item.manual is not None:
        manual = item.manual
        yield f"Signed by {manual.signer} on {manual.date}, to be verified again on {manual.verify_again}."
        return
    yield from (f"- `{check}`: {observes(check)}" for check in item.checks)
    yield ""
    yield f"Prove it: `{proof(item)}`" + (f". See [{item.docs}]({_link(item.docs)})." if item.docs else "")


def proof(item: Item) -> str:
    """The command that runs the item's checks on a packaged model that it speaks of."""
    model = having(item.needs, item.lacks) or "MODEL"
    return reproduce.line("run", *item.checks, model=model)


def _link(docs: str) -> str:
    """A path from the top of the project, as seen from the page's folder."""
    return docs.removeprefix("docs/") if docs.startswith("docs/") else f"../{docs}"
