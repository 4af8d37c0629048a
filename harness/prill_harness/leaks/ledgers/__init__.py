"""What a process holds, counted to the byte."""
