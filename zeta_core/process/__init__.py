"""The processes of a run: launching them, and detecting a lost worker."""
