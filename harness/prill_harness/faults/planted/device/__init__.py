"""Bugs on devices."""
