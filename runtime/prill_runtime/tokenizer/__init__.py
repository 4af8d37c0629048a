"""Text to ids and back, by the rules that a model's file states."""
