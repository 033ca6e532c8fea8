"""Inserting rows that may exist already. SQLAlchemy has ``ON CONFLICT`` only in the statements of each database."""

from __future__ import annotations

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import Table


def dialect_insert(session: AsyncSession, row: type[Table]) -> postgresql.Insert | sqlite.Insert:
    """An ``INSERT`` for the database of this session."""
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    return postgresql.insert(row) if is_postgresql else sqlite.insert(row)
