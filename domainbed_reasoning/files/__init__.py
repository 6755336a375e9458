"""Files: written whole, read with bounds, locked; the user's cache folder."""
