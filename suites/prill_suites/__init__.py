"""Checks shipped to users: pytest files by subject, and checklists."""
