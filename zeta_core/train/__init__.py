"""The training loop, and what goes on beside it: saving, measuring, noticing that it fails to learn or to fit."""
