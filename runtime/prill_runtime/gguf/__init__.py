"""Bytes of a file go in; checked tables, names and shapes come out."""
