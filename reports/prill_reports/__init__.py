"""Verdict to text: JUnit, Markdown."""
