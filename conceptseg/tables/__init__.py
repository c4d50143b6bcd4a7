"""Compute tables of evaluations, and draw what goes beside them."""
