"""What a run leaves behind, as data: evidence, ledgers, verdicts, and the checks they speak of."""
