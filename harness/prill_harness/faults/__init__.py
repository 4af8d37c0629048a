"""The planted faults, and the trial in which the checks must find each of them."""
