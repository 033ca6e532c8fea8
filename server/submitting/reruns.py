"""Reruns: a new job out of an earlier one's spec, patched, from its start or from one of its checkpoints."""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.checkpoints import LATEST, newest_resumable
from server.database.tables import CheckpointRow, JobRow
from server.http.bodies import check_size
from server.jobs.queries import find_job
from server.service import Service
from server.submitting.submissions import answered_before, create, submission
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.job.commands import FROM_START, Rerun
from zeta_core.contract.job.job import Job
from zeta_core.contract.spec.sources import KINDS
from zeta_core.contract.spec.validation import parse


async def rerun(
    service: Service, caller: Caller, job_id: str, data: Any, idempotency_key: str | None
) -> tuple[Job, bool]:
    """The new job, and whether it was answered before. Raises `NotFound` and `InvalidRequest` kinds.

    Faults of the patched spec are named by its fields, as those of a submission.
    """
    request = submission(idempotency_key, {"rerun": job_id, "body": data})
    earlier = await answered_before(service, caller, request)
    if earlier is not None:
        return earlier, True
    asked = parse(Rerun, data, error_class=InvalidRequest)
    async with service.database.read() as session:
        parent = await find_job(session, caller, job_id)
        checkpoint = await _checkpoint(session, parent, asked.from_)
    patched = _patched(parent, asked, checkpoint)
    check_size(patched, service.settings.max_spec_bytes)  # patches of patches must not grow without a limit
    return await create(service, caller, patched, request, parent=parent.id)


async def _checkpoint(session: AsyncSession, parent: JobRow, named: str) -> str | None:
    """The checkpoint to resume, as it is called now; ``None`` for a rerun from the start."""
    if named == FROM_START:
        return None
    if named == LATEST:
        found = await newest_resumable(session, parent.id)
    else:
        row = await session.get(CheckpointRow, (parent.id, named))
        found = row.name if row else None
    if found is None:
        raise InvalidRequest(
            f"from is {named!r}, and {parent.id} has no such checkpoint; GET /v1/jobs/{parent.id}/checkpoints lists "
            'what it has, and "from": "start" needs none.',
            code="checkpoint_not_found",
            param="from",
        )
    return found


def _patched(parent: JobRow, asked: Rerun, checkpoint: str | None) -> dict[str, Any]:
    """The parent's spec as it was sent, patched; where it said ``latest`` of a job, with what that meant for it."""
    if asked.patch.get("resume_from_checkpoint") is not None:
        raise InvalidRequest(
            "patch.resume_from_checkpoint is given; name the checkpoint in from, as 'latest' or 'step-N'.",
            code="invalid_value",
            param="patch.resume_from_checkpoint",
        )
    base = dict(parent.spec)
    if parent.resolved_spec.job_model is not None:
        base["model"] = parent.resolved_spec.model
    for name, kinds in KINDS.items():
        now, then = asked.patch.get(name), base.get(name)
        if isinstance(now, dict) and isinstance(then, dict) and any(kind in now and kind not in then for kind in kinds):
            base.pop(name)  # one of another kind replaces the old one: merged into it, it could never be valid
    spec = merged(base, asked.patch)
    spec.pop("resume_from_checkpoint", None)
    return spec if checkpoint is None else {**spec, "resume_from_checkpoint": f"{parent.id}/{checkpoint}"}


def merged(target: Any, patch: Any) -> Any:
    """``target`` under a JSON merge patch (RFC 7396): objects are merged by name, null removes, the rest replaces."""
    if not isinstance(patch, dict):
        return patch
    result: dict[str, Any] = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result
