"""Bugs in files, blocks and forward passes."""
