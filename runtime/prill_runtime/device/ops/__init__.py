"""The operations of a model on a device, exact, on tensor cores, and of the sampler."""
