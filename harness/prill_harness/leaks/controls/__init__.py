"""Mock engines with known leaks."""
