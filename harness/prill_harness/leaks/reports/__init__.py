"""What a probe finds, as data: readings judged, reports, curves."""
