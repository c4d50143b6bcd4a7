"""The run folder: manifest, append-only rows, and what is still missing."""
