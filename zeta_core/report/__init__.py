"""Reporting a run: journal lines, console output, and curves for trackers."""
