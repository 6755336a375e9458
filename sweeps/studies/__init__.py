"""Studies: the grids of the paper's tables."""
