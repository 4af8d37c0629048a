"""Bugs in tokenizers, samplers, requests, sessions and their memory."""
