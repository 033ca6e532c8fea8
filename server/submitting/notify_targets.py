"""Validates the field ``notify`` of a spec: webhooks must exist, and addresses must be allowed."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.webhook_tables import WebhookRow
from server.settings import ServerSettings
from server.webhooks import url_fault
from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.spec.notify import Notify
from zeta_core.contract.spec.validation import invalid_value, shown


async def notify_faults(
    session: AsyncSession, settings: ServerSettings, project: str, entries: Sequence[Notify]
) -> list[ErrorDetail]:
    """One detail for every target to which the job can't send messages."""
    ids = {entry.to for entry in entries if is_id(entry.to, "webhook")}
    query = select(WebhookRow.id).where(WebhookRow.id.in_(ids), WebhookRow.project == project)
    existing = set(await session.scalars(query)) if ids else set[str]()
    faults: list[ErrorDetail] = []
    targets: set[str] = set()
    for number, entry in enumerate(entries):
        param = f"notify.{number}.to"
        if entry.to in targets:
            faults.append(invalid_value(param, entry.to, "it is listed twice; combine their events"))
        elif is_id(entry.to, "webhook"):
            if entry.to not in existing:
                message = f"{param} is {shown(entry.to)}, which is not a webhook of this project; see GET /v1/webhooks."
                faults.append(ErrorDetail(param=param, message=message, code="webhook_not_found"))
        elif (fault := url_fault(settings, entry.to, entry.format)) is not None:
            faults.append(invalid_value(param, entry.to, fault))
        targets.add(entry.to)
    return faults
