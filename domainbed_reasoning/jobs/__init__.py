"""One training job: its session, its files, its afterlife."""
