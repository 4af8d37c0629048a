"""`llamacpp:FOLDER`: libllama through its own C API, always in a child process."""
