"""Text goes in, ids come out, and back, by the rules that a model's file states."""
