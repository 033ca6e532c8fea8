"""The training loop, saving, measuring, and diagnosing divergence and out-of-memory errors."""
