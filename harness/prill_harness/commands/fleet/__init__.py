"""Commands about a plan and its parts, which may run on many machines."""
