"""The kill matrix: which checks find which planted fault, and what is owed since."""
