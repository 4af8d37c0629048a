"""What lies where on a device: the arena, weights, arrays, the slot of a sequence."""
