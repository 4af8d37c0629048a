"""The code that runs inside the probed process."""
