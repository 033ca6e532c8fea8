"""Dry runs without training: checking a spec, estimating its memory, showing rows of its data."""
