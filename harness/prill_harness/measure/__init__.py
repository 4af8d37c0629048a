"""What an engine costs (time, operations, device memory), and how two files differ."""
