"""Settings of all tests: no example has a time limit, which a busy machine alone could exceed."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("unhurried", settings(), deadline=None)
settings.load_profile("unhurried")
