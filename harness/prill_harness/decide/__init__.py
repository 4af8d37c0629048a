"""Records go in; the verdict, and whatever may excuse a failure, come out."""
