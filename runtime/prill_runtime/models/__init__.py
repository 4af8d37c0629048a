"""What each architecture is: its keys, its tensors, its forward pass; and the cache it keeps."""
