"""Decide: from records to the verdict, and what may excuse a failure."""
