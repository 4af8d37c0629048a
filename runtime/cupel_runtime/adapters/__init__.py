"""Forward passes, one per architecture, found by declaration."""
