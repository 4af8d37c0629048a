"""An embedded inference runtime: GGUF file in, logits and tokens out; no other room is imported here."""
