"""Loading models and tokenizers, choosing trainable parameters, and exporting checkpoints that other libraries load."""
