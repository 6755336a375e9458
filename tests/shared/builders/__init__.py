"""What test files build alike: processes, files and folders, chains, algorithms, servers' responses."""
