"""The Engine protocol and its connectors."""
