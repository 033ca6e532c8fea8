"""A training's process tree: launched, found by its mark, watched, and known to be gone."""
