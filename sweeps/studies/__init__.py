"""Studies: sweeps that reproduce the paper's tables."""
