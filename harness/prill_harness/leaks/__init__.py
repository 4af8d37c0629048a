"""Leak probes: ledgers that are exact to the byte, windows that must all grow, a verdict of three words."""
