"""Grants or denies a worker's claim to start an attempt. Only a granted claim makes a job ``running``."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import AttemptRow
from server.database.transitions import StatusChange, change_status, lock_job
from server.engine.nodes.starts import claim_node
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.messages import Claim, ClaimAnswer


async def answer_claim(session: AsyncSession, claim: Claim) -> ClaimAnswer:
    """Grant the claim, in this transaction, if the job was dispatched to this worker and this is its next attempt.

    A repeated claim of the same worker process is granted again, because the first answer may have been lost. Any other
    claim is denied with a reason. An attempt on several workers has run since its dispatch, and each worker claims its
    node.
    """
    job = await lock_job(session, claim.job_id)
    if job is None:
        return _deny(claim, "the job does not exist")
    if job.status == JobStatus.RUNNING and job.attempt == claim.attempt:
        running = await session.get(AttemptRow, (job.id, claim.attempt))
        if running and running.num_nodes > 1:
            refusal = await claim_node(session, running, claim)
            return _grant(claim) if refusal is None else _deny(claim, refusal)
        if running and (running.worker, running.incarnation) == (claim.worker, claim.incarnation):
            return _grant(claim)
        return _deny(claim, "the attempt was started by another process")
    if job.status != JobStatus.QUEUED:
        return _deny(claim, f"the job is {job.status}")
    if job.attempt + 1 != claim.attempt:
        return _deny(claim, f"the next attempt is {job.attempt + 1}")
    if job.worker != claim.worker:
        return _deny(claim, "the dispatch was withdrawn")
    now = utc_now()
    job.attempt = claim.attempt
    job.started_at = job.started_at or now
    job.not_before = None
    session.add(
        AttemptRow(
            job_id=job.id, attempt=claim.attempt, worker=claim.worker, incarnation=claim.incarnation, started_at=now
        )
    )
    started = StatusChange(JobStatus.RUNNING, worker=claim.worker, at=now)
    is_changed = await change_status(session, job, started, expect={JobStatus.QUEUED}, attempt=claim.attempt)
    assert is_changed, f"{job.id} is locked and was queued"
    return _grant(claim)


def _grant(claim: Claim) -> ClaimAnswer:
    return ClaimAnswer(job_id=claim.job_id, attempt=claim.attempt, incarnation=claim.incarnation, granted=True)


def _deny(claim: Claim, reason: str) -> ClaimAnswer:
    return ClaimAnswer(
        job_id=claim.job_id, attempt=claim.attempt, incarnation=claim.incarnation, granted=False, reason=reason
    )
