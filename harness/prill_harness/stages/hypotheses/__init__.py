"""Hypotheses: the textbook mistakes that may explain a wrong stage's numbers."""
