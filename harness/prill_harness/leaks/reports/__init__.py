"""What a probe found, as data."""
