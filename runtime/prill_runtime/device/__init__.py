"""A model on a device: machines, memory, operations, steps, and the model itself."""
