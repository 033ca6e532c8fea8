"""The database: its tables, its two doors, and the one door each for a job's status and its events."""
