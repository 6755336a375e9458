"""Builders shared by tests: processes, files and folders, chains, algorithms, server responses."""
