"""What runs inside the probed process."""
