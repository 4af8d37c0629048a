"""Drawing a token id from logits, reproducibly."""
