"""Training jobs: session, files, resume, prediction and export."""
