"""The database's schema, revision by revision (Alembic): ``python -m migrations`` brings a database to the newest."""
