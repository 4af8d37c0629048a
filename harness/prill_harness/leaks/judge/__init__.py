"""Run the probed process, and judge what it reports."""
