"""Estimates a job before it runs: parameters, steps, tokens, memory, disk space and time."""
