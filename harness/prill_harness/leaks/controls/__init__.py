"""Pretended engines with known leaks."""
