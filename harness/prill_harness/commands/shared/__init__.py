"""What several commands share: options, checks of their arguments, output."""
