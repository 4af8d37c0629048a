"""Each planted fault goes in; which checks found it, and what is owed since, comes out."""
