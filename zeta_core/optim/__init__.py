"""Updating parameters: optimizers, usual learning rates, the schedule, and the loss scale."""
