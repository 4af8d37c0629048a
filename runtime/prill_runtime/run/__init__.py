"""A model's file and a request go in; its tokens, computed on the host, come out."""
