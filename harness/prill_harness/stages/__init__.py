"""An engine's stages beside the oracle's: the first that is wrong, and why."""
