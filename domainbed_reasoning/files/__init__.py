"""Files: atomic writes, bounded reads, locks; the user's cache folder."""
