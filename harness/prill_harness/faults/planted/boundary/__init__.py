"""Faults of libraries and processes that the boundary suite calls."""
