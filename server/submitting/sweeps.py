"""Creates sweeps: all jobs of a sweep in one transaction, or none of them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.audit_entries import insert_entries
from server.database.tables import SweepRow
from server.database.transitions import create_jobs
from server.http.bodies import check_size
from server.jobs.sweeps import jobs_of, to_result
from server.service import Service
from server.submitting.acceptance import accept, read_spec
from server.submitting.quotas import QueueLimits, check_stored_bytes
from server.submitting.submissions import SubmissionOrigin, check_idempotency_key, new_job_row
from server.tracing import current_trace_parent
from zeta_core.contract.errors import ErrorDetail, InvalidRequest, InvalidSpec
from zeta_core.contract.identifiers import new_id_at
from zeta_core.contract.job.sweep import Settings, SweepRequest, SweepResult, with_settings
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.validation import parse, shown


async def create_sweep(
    service: Service, caller: Caller, body: Any, idempotency_key: str | None
) -> tuple[SweepResult, bool]:
    """Create a sweep with its jobs, or return the one that an earlier, equal request created (then with ``True``).
    Raises `InvalidRequest`, `QuotaExceeded`, and `InvalidSpec` with the number and the settings of the first invalid
    job.
    """
    if idempotency_key is not None:
        check_idempotency_key(idempotency_key)
        if (earlier := await _find_created(service, caller, body, idempotency_key)) is not None:
            return earlier, True
    request = parse(SweepRequest, body, error_class=InvalidRequest)
    jobs = [await _read_job(service, caller, request, settings) for settings in request.combinations()]
    await check_stored_bytes(service, caller)
    try:
        async with service.database.write() as session:
            first_comparison = None if request.halving is None else 0
            result = await _insert(session, service, caller, body, jobs, idempotency_key, first_comparison)
    except IntegrityError:  # another request with the same key was faster
        assert idempotency_key is not None, "only the idempotency key is unique"
        created = await _find_created(service, caller, body, idempotency_key)
        assert created is not None, "the other request has inserted its row"
        return created, True
    service.engine.wake_scheduler()
    return result, False


_Job = tuple[Settings, dict[str, Any], JobSpec]  # the settings of a job, its body, and the spec in it


async def _read_job(service: Service, caller: Caller, request: SweepRequest, settings: Settings) -> _Job:
    try:
        body = with_settings(request.spec, settings)
    except ValueError as error:
        raise InvalidRequest(
            f"{error}; set the whole object in the grid.", code="invalid_value", param="grid"
        ) from error
    check_size(body, service.settings.max_spec_bytes)
    try:
        return settings, body, await read_spec(service, caller, body)
    except InvalidSpec as error:
        raise _with_settings(error, settings) from error


async def _insert(
    session: AsyncSession,
    service: Service,
    caller: Caller,
    body: Any,
    jobs: list[_Job],
    idempotency_key: str | None,
    first_comparison: int | None,
) -> SweepResult:
    sweep_id, created_at = new_id_at("sweep")
    sweep = SweepRow(
        id=sweep_id,
        project=caller.project,
        created_by=caller.key_id,
        created_at=created_at,
        request=body,
        idempotency_key=idempotency_key,
        next_comparison=first_comparison,
    )
    session.add(sweep)
    await session.flush()
    queue = QueueLimits(session)
    rows = []
    for settings, job_body, spec in jobs:
        try:
            accepted = await accept(session, service, caller, spec)
        except InvalidSpec as error:
            raise _with_settings(error, settings) from error
        await queue.add(caller)
        rows.append(new_job_row(service, caller, job_body, accepted, SubmissionOrigin(sweep=sweep_id)))
    await create_jobs(session, rows, {row.id: current_trace_parent() for row in rows})
    entries = [caller.audit_row("job.submit", row.id, project=row.project, sweep=sweep_id) for row in rows]
    await insert_entries(session, [*entries, caller.audit_row("sweep.create", sweep_id, project=caller.project)])
    return to_result(sweep, rows)


async def _find_created(service: Service, caller: Caller, body: Any, idempotency_key: str) -> SweepResult | None:
    """The sweep that an earlier request with this key created. Raises `InvalidRequest` if its body was different."""
    query = select(SweepRow).where(
        SweepRow.project == caller.project,
        SweepRow.created_by == caller.key_id,
        SweepRow.idempotency_key == idempotency_key,
    )
    async with service.database.read() as session:
        sweep = await session.scalar(query)
        if sweep is None:
            return None
        if sweep.request != body:
            raise InvalidRequest(
                f"Idempotency-Key {shown(idempotency_key)} was used for another sweep, {sweep.id}; use a new key.",
                code="idempotency_key_reused",
                param="Idempotency-Key",
            )
        return to_result(sweep, await jobs_of(session, sweep.id))


def _with_settings(error: InvalidSpec, settings: Settings) -> InvalidSpec:
    """The error of one job, with the settings that distinguish it from the others."""
    shown_settings = ", ".join(f"{name}={shown(value)}" for name, value in settings.items())
    details: list[ErrorDetail] = list(error.details)
    return InvalidSpec(
        f"The job with {shown_settings} is invalid: {error.message}",
        code=error.code,
        param=error.param,
        suggestion=error.suggestion,
        details=details,
    )
