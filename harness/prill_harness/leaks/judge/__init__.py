"""The probed process goes in; the verdict on it comes out."""
