"""What is learned and how well: losses, preferences, evaluation on held-out data, sampled text."""
