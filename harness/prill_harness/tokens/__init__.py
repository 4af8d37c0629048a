"""An engine's tokens against the golden's: the first that differs, and whether noise explains it."""
