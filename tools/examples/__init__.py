"""Programs to copy. Each runs alone, by its path, and imports nothing of tools."""
