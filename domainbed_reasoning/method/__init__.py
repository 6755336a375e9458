"""The paper's equations and algorithm 1, given a model."""
