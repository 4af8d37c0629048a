"""pytest's own run goes in; evidence, check by check, comes out."""
