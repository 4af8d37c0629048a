"""Blocks of a file go in; the numbers they stand for come out."""
