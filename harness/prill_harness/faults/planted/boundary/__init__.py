"""Faults at the boundary of a library and of a process."""
