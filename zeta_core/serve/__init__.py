"""Serving: a process that keeps one model loaded and answers requests, several at a time."""
