"""What a worker hears and says over Redis: hand-overs through Celery, messages, heartbeats."""
