"""Channels to engines outside prill: in a user's module, or in a process."""
