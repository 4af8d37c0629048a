"""A wrong stage goes in; the textbook mistake that makes its numbers agree comes out."""
