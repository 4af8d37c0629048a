"""The harness: engines, comparison, evidence, checklists, gate."""
