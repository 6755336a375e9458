"""The miniature study and its embedded model."""
