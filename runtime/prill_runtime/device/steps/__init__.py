"""Steps of a model on a device: the prompt, the captured graph, and their cache."""
