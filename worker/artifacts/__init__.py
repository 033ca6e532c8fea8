"""Storing checkpoints, logs and curves in the artifact store, and cleaning up the worker's folder."""
