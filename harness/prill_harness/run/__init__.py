"""Run cells, each in a process of its own, and put their ledgers together."""
