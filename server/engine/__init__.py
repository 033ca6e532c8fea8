"""The engine: hands jobs over, answers claims, keeps the events, watches the workers."""
