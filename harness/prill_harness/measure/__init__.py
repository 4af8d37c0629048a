"""What an engine costs: time, operations, device memory; and what two files differ in."""
