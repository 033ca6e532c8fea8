"""What a worker puts into the artifact store and clears away: checkpoints, logs, curves."""
