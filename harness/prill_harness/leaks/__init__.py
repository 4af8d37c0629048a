"""The leak probe: exact ledgers, growth that must show in every window, and a verdict."""
