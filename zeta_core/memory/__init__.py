"""Memory and compute: the minimum that a run needs, estimates of its usage, and measurements."""
