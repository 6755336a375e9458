"""The paper's equations and algorithm 1, independent of the model."""
