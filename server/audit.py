"""Lists the audit log: one entry for each change that a request made, written in the transaction of the change."""

from __future__ import annotations

import re

from pydantic import Field
from sqlalchemy import select

from server.database.access_tables import AuditRow
from server.database.nul_characters import replace_nul
from server.database.pagination import PageQuery, cursor, page
from server.service import Service
from zeta_core.contract.access import AuditEntry
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.job.responses import Page
from zeta_core.contract.spec.validation import shown

_ID_PATTERN = r"^audit_([0-9]{1,18})$"
_ID = re.compile(_ID_PATTERN)


class AuditQuery(PageQuery):
    """All filters must match."""

    after: str | None = cursor(_ID_PATTERN)
    project: str | None = Field(default=None, description="only changes in this project")
    key_id: str | None = Field(default=None, description="only changes made with this key")
    action: str | None = Field(default=None, description="only this action, such as `job.cancel`")
    object_id: str | None = Field(default=None, description="only changes of this object")


async def list_entries(service: Service, filters: AuditQuery) -> Page[AuditEntry]:
    """One page of the matching entries, newest first. Raises `InvalidRequest` for an invalid ``after``."""
    query = select(AuditRow).order_by(AuditRow.id.desc()).limit(filters.limit + 1)
    for name in ("project", "key_id", "action", "object_id"):
        value: str | None = getattr(filters, name)
        if value is not None:
            query = query.where(getattr(AuditRow, name) == replace_nul(value))
    if filters.after is not None:
        if (match := _ID.fullmatch(filters.after)) is None:
            raise InvalidRequest(
                f"after is {shown(filters.after)}, which is not a valid id; use the last_id of an earlier page.",
                param="after",
            )
        query = query.where(AuditRow.id < int(match.group(1)))
    async with service.database.read() as session:
        rows = list(await session.scalars(query))
    entries = [_to_entry(row) for row in rows[: filters.limit]]
    return page(entries, len(rows) > filters.limit, lambda entry: entry.id)


def _to_entry(row: AuditRow) -> AuditEntry:
    names = ("created_at", "project", "key_id", "key_name", "address", "action", "object_id", "details")
    return AuditEntry(id=f"audit_{row.id}", **{name: getattr(row, name) for name in names})
