"""The planted faults, and the trial in which each has to be found."""
