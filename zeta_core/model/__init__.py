"""The model, from its source to what is trained of it, and what is written of it for others to load."""
