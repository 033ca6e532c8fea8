"""The worker's communication over Redis: dispatches through Celery, messages and heartbeats."""
