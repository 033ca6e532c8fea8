"""Checks specs for the server, in a process beside the trainings."""
