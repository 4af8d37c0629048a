"""Faults that any engine can have planted: files changed, and answers spoiled on their way."""
