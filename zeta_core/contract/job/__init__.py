"""A job as the API shows it: status, events, checkpoints, estimates and reports."""
