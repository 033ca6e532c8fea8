"""Existing jobs: reading, controlling, streaming and deleting them, and serving their logs, curves and checkpoints."""
