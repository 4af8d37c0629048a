"""The operations that a model is written in, and their arithmetic on the host."""
