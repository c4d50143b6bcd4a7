"""From a finished table to a terminal, to RESULTS.md and to a sheet of pictures. Nothing here imports torch or reads runs."""
