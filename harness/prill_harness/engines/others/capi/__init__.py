"""An engine in a C library: the header it implements, a complete example, and its child processes."""
