"""The commands of prill, one module each."""
