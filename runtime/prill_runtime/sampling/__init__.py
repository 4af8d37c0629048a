"""Logits and a request's parameters go in; the id that is drawn comes out."""
