"""All tables of the database: importing this module registers each of them in `METADATA`."""

from __future__ import annotations

from server.database import (
    access_tables,
    file_tables,
    object_removals,
    placements,
    receipt_tables,
    recent_use,
    tables,
    usage_table,
    webhook_tables,
)

MODULES = (
    access_tables,
    file_tables,
    object_removals,
    placements,
    receipt_tables,
    recent_use,
    tables,
    usage_table,
    webhook_tables,
)
METADATA = tables.Table.metadata
