"""A model on the host: loading, forward passes, and the loop that writes a text."""
