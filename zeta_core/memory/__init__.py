"""Memory and arithmetic: what a run needs, what it will take, what it uses."""
