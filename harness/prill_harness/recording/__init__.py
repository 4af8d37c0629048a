"""pytest's side of a cell: fixtures, the recorder that writes evidence, the forked process."""
