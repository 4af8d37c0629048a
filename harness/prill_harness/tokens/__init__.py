"""An engine's tokens beside the golden: the first that differs, and whether noise explains it."""
