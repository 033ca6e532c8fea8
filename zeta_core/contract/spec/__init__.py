"""The job spec: its fields, sources, defaults and validation."""
