"""Answers the server's questions about specs, in a process beside the trainings."""
