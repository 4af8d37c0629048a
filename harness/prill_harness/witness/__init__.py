"""Readings of a model file that share no code with the runtime."""
