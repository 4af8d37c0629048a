"""Cells go in, each in a process of its own; their ledgers come out."""
