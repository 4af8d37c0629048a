"""Bugs in the harness itself."""
