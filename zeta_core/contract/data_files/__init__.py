"""Training data files: their types by name, and signatures in their first bytes."""
