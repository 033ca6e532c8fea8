"""Shared access to the system: settings, addresses, file identity, device kinds, memory kills and outages."""
