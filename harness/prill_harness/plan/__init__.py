"""A policy and a request go in; what must run, as data, comes out."""
