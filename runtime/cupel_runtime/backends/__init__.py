"""Implementations of the ops protocol."""
