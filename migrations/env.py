"""The script that Alembic runs for each command: one transaction on the connection of `migrations.upgrade`."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from server.database.all_tables import METADATA

connection = context.config.attributes.get("connection")
assert isinstance(connection, Connection), "run `python -m migrations`, which opens the connection"

context.configure(
    connection=connection,
    target_metadata=METADATA,
    transactional_ddl=True,
    render_as_batch=connection.dialect.name == "sqlite",
)
with context.begin_transaction():
    context.run_migrations()
