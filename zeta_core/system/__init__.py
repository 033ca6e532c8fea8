"""Shared access to the system.

It covers settings, addresses, file identity, durable files, data folders, model files, device kinds, OOM kills and
outages.
"""
