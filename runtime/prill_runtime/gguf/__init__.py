"""GGUF files: header, keys, tensor table and parts, every count and offset checked."""
