"""Commands about an engine, a model or a golden."""
