"""One file for each architecture: what a model file of it says, as a tree of nodes."""
