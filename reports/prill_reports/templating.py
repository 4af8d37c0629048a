"""Render templates with everything escaped."""

from __future__ import annotations

import functools

import jinja2

from prill_reports.text import one_line


def page(template: str, **shown: object) -> str:
    """Render a template."""
    return _environment().get_template(template).render(**shown)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("prill_reports", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_plain,
    )


def _plain(value: object) -> object:
    """A value for printing: control characters and surrogates as escapes; autoescape handles markup."""
    return one_line(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
