"""The update: optimizers, usual learning rates, the schedule, and the loss scale."""
