"""Reruns a job: a new job with the patched spec, from the start or from one of the job's checkpoints."""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.checkpoints import LATEST, newest_resumable
from server.database.tables import CheckpointRow, JobRow
from server.http.bodies import check_size
from server.jobs.queries import find_job
from server.service import Service
from server.submitting.submissions import CreatedJob, SubmissionOrigin, Submissions, find_created_job, identify_request
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.job.commands import FROM_START, Rerun
from zeta_core.contract.job.kind import KINDS, JobKind
from zeta_core.contract.spec.kinds import CHANGED_BY_RERUNS
from zeta_core.contract.spec.sources import KINDS as SOURCE_KINDS
from zeta_core.contract.spec.validation import cut, parse, shown


async def rerun(
    service: Service, submissions: Submissions, caller: Caller, job_id: str, body: Any, idempotency_key: str | None
) -> CreatedJob:
    """Create the new job, or return the one that an earlier, equal request created.

    Raises `NotFound` and subclasses of `InvalidRequest`. Errors in the patched spec name its fields.
    """
    request = identify_request(idempotency_key, {"rerun": job_id, "body": body})
    created = await find_created_job(service, caller, request)
    if created is not None:
        return created, True
    options = parse(Rerun, body, error_class=InvalidRequest)
    async with service.database.read() as session:
        parent = await find_job(session, caller, job_id)
        _check_patch(parent, options.patch)
        checkpoint = await _checkpoint(session, parent, options.from_)
    patched = _patched_spec(parent, options.patch, checkpoint)
    check_size(patched, service.settings.max_spec_bytes)  # otherwise, reruns of reruns could grow without limit
    return await submissions.create(
        caller, patched, request, SubmissionOrigin(kind=JobKind(parent.kind), parent=parent.id)
    )


async def _checkpoint(session: AsyncSession, parent: JobRow, requested: str) -> str | None:
    """The name of the checkpoint to resume, with ``latest`` resolved; ``None`` for a rerun from the start."""
    if requested == FROM_START:
        return None
    if not KINDS[JobKind(parent.kind)].saves_checkpoints:
        raise InvalidRequest(
            f"from is {requested!r}, but {parent.id} is a job of kind {parent.kind}, which always starts anew; "
            "omit from.",
            code="not_a_training",
            param="from",
        )
    if requested == LATEST:
        name = await newest_resumable(session, parent.id)
    else:
        row = await session.get(CheckpointRow, (parent.id, requested))
        name = row.name if row else None
    if name is None:
        raise InvalidRequest(
            f"from is {requested!r}, but {parent.id} has no such checkpoint; list its checkpoints with "
            f"`zeta checkpoints {parent.id}` or GET /v1/jobs/{parent.id}/checkpoints, or use 'start' to begin anew.",
            code="checkpoint_not_found",
            param="from",
        )
    return name


def _check_patch(parent: JobRow, patch: dict[str, Any]) -> None:
    """Raise `InvalidRequest` if the patch changes a field that the server has derived and checked."""
    kind = JobKind(parent.kind)
    if kind is JobKind.TRAINING:
        return
    allowed = CHANGED_BY_RERUNS[kind]
    for name in patch:
        if name not in allowed:
            raise InvalidRequest(
                f"patch contains {shown(name)}, which can't be changed in a rerun of a job of kind {kind}; change "
                f"{', '.join(allowed)}, or create a new {kind}.",
                code="invalid_value",
                param=f"patch.{cut(name)}",
            )


def _patched_spec(parent: JobRow, patch: dict[str, Any], checkpoint: str | None) -> dict[str, Any]:
    """The parent's submitted spec with the patch; ``latest`` in its model keeps the checkpoint that the parent used."""
    if patch.get("resume_from_checkpoint") is not None:
        raise InvalidRequest(
            "patch.resume_from_checkpoint is not allowed; set from to 'latest' or 'step-N' instead.",
            code="invalid_value",
            param="patch.resume_from_checkpoint",
        )
    base = dict(parent.spec)
    if parent.resolved_spec.job_model is not None:
        base["model"] = parent.resolved_spec.model
    for name, kinds in SOURCE_KINDS.items():
        new, old = patch.get(name), base.get(name)
        if isinstance(new, dict) and isinstance(old, dict) and any(kind in new and kind not in old for kind in kinds):
            base.pop(name)  # another kind of source replaces the old one; a merge of both would be invalid
    spec = apply_merge_patch(base, patch)
    spec.pop("resume_from_checkpoint", None)
    return spec if checkpoint is None else {**spec, "resume_from_checkpoint": f"{parent.id}/{checkpoint}"}


def apply_merge_patch(target: Any, patch: Any) -> Any:
    """``target`` with a JSON merge patch (RFC 7396): objects are merged, null removes a field."""
    if not isinstance(patch, dict):
        return patch
    result: dict[str, Any] = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = apply_merge_patch(result.get(name), value)
    return result
