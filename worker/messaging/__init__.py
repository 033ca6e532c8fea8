"""The worker's communication over Redis: hand-overs through Celery, messages and heartbeats."""
