"""The database schema as Alembic revisions; ``python -m migrations`` upgrades a database to the latest one."""
