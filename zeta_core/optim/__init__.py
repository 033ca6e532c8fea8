"""The update: optimizers, their usual rates, the schedule, the loss scale."""
