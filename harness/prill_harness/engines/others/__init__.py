"""Engines that need no connection: answers that were recorded elsewhere, and transformers."""
