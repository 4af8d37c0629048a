"""What models are made of: data that tells its tensors, its stages, its cache and its arithmetic."""
