"""The interface of the `openai` client, ``/openai/v1``: a translation of jobs, files and events."""
