"""Checks specs for the server, in a process of their own."""
