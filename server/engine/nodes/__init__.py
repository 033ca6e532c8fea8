"""Attempts on several workers, the nodes of the attempt: how they start together and end together."""
