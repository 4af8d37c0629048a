"""One file for each format: `render(verdict, options=…)`, and `FILE` where each gate writes the report."""
