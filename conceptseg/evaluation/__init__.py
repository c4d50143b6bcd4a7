"""Carry out one evaluation: assemble it, loop over batches, read the numbers off its rows."""
