"""The script that Alembic runs for each command: one transaction on the connection of `migrations.upgrade`."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

import server.database.access_tables  # pyright: ignore[reportUnusedImport] - registers its tables
import server.database.file_tables  # pyright: ignore[reportUnusedImport] - registers its tables
import server.database.object_removals  # pyright: ignore[reportUnusedImport] - registers its tables
import server.database.placements  # pyright: ignore[reportUnusedImport] - registers its tables
import server.database.receipt_tables  # pyright: ignore[reportUnusedImport] - registers its tables
import server.database.recent_use  # pyright: ignore[reportUnusedImport] - registers its tables
import server.database.tables
import server.database.usage_table  # pyright: ignore[reportUnusedImport] - registers its tables
import server.database.webhook_tables  # pyright: ignore[reportUnusedImport] - registers its tables

connection = context.config.attributes.get("connection")
assert isinstance(connection, Connection), "run `python -m migrations`, which opens the connection"

context.configure(
    connection=connection,
    target_metadata=server.database.tables.Table.metadata,
    transactional_ddl=True,
    render_as_batch=connection.dialect.name == "sqlite",
)
with context.begin_transaction():
    context.run_migrations()
