"""Receives uploaded files: multipart parsing, file names and formats, quotas, and the safety check of models."""
