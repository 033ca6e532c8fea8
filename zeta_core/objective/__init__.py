"""Losses, including that of preferences (DPO), evaluation on held-out data, and samples of generated text."""
