"""An engine's stages against the oracle's: which is the first wrong one, and why."""
