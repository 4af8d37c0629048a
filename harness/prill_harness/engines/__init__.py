"""Any engine behind the same few calls."""
