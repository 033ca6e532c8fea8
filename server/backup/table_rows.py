"""Copying all rows of a database to another one with the same schema, also between SQLite and PostgreSQL.

JSON is copied as text, because SQL's NULL and JSON's null, which queries distinguish, are the same value in Python.
"""

from __future__ import annotations

from sqlalchemy import JSON, Column, Connection, Text, bindparam, cast, delete, func, insert, inspect, select, text
from sqlalchemy import Table as SqlTable

from server.database.access_tables import AuditRow
from server.database.all_tables import METADATA
from server.database.tables import Document, JobCountRow, JobMetadataRow

FILLED_BY_TRIGGERS = frozenset({JobMetadataRow.__tablename__, JobCountRow.__tablename__})  # when a job is inserted
APPEND_ONLY = frozenset({AuditRow.__tablename__})  # empty in a new database
_BATCH_ROWS = 1000


def copy_rows(source: Connection, target: Connection) -> None:
    """Copy every row to a new database, whose migrations may have added rows, in the order of its foreign keys."""
    own = source if source.dialect.name == "sqlite" else target  # PostgreSQL may have tables of other programs
    assert set(inspect(own).get_table_names()) == {*METADATA.tables, "alembic_version"}, "`all_tables` lacks a module"
    tables = sorted(METADATA.sorted_tables, key=lambda table: table.name in FILLED_BY_TRIGGERS)
    for table in reversed(METADATA.sorted_tables):
        if table.name not in APPEND_ONLY:
            target.execute(delete(table))
    for table in tables:
        if table.name in FILLED_BY_TRIGGERS:
            target.execute(delete(table))
        _copy_table(table, source, target)
    if target.dialect.name == "postgresql":
        for table in tables:
            _continue_sequence(table, target)


def _copy_table(table: SqlTable, source: Connection, target: Connection) -> None:
    columns = [cast(column, Text).label(column.name) if _is_json(column) else column for column in table.columns]
    rows = source.execution_options(yield_per=_BATCH_ROWS).execute(select(*columns).order_by(*table.primary_key))
    values = {column.name: _parameter(column, target) for column in table.columns}
    for batch in rows.mappings().partitions(_BATCH_ROWS):
        target.execute(insert(table).values(values), [{f"p_{name}": row[name] for name in row} for row in batch])


def _parameter(column: Column[object], target: Connection) -> object:
    name = f"p_{column.name}"
    if not _is_json(column):
        return bindparam(name, type_=column.type)
    json_text = bindparam(name, type_=Text())
    return cast(json_text, Document) if target.dialect.name == "postgresql" else json_text


def _is_json(column: Column[object]) -> bool:
    return isinstance(column.type, JSON)


def _continue_sequence(table: SqlTable, target: Connection) -> None:
    """Let generated ids begin after those of the copied rows."""
    column = table.autoincrement_column
    if column is None:
        return
    name = target.scalar(select(func.pg_get_serial_sequence(table.name, column.name)))
    if name is not None:
        largest = target.scalar(select(func.max(column)))
        target.execute(text("SELECT setval(:name, :next, false)"), {"name": name, "next": (largest or 0) + 1})
