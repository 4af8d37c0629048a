"""Arithmetic of comparing: how far numbers are apart, and how far they may be."""
