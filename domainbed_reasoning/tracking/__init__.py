"""Experiment trackers, fed from the files that a job writes, by a process of its own."""
