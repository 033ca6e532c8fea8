"""The engine: schedules jobs, answers claims, stores events and monitors workers."""
