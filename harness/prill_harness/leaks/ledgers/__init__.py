"""The ledgers: what a process holds, to the byte."""
