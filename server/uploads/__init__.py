"""Files that clients upload: told apart, stored as they arrive, listed."""
