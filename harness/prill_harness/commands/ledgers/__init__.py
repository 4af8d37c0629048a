"""Commands that look into ledgers and verdicts that are there."""
