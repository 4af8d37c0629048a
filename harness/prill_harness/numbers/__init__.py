"""How far two results are apart, and how far they may be."""
