"""The database: connections, tables, and the functions that change jobs, events and checkpoints."""
