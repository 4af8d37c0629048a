"""Readings of a model's file that owe nothing to the runtime."""
