"""Policy and plan: what must run, as data."""
