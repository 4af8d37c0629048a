"""Block formats: the float32 weights that a file's bytes stand for."""
