"""Commands about runs, verdicts, checks and this installation."""
