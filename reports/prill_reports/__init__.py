"""Reports rendered from a verdict: JUnit, Markdown, HTML, the checklist."""
