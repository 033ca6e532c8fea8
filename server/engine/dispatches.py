"""Records the dispatch of a queued job to one or several workers, and builds the messages to them.

A job on one worker stays queued until the worker has claimed it. On several workers, the attempt begins with its
dispatch: it is written with the placements of all its nodes, and then each worker claims its node.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from server.database.checkpoints import own_or_named_checkpoint
from server.database.model_bases import names_of_bases
from server.database.placements import PlacementRow, PlacementState
from server.database.tables import AttemptRow, JobRow
from server.database.transitions import StatusChange, change_status
from server.engine.candidate import Placement, Wait
from zeta_core.contract.access import HubAccess
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.job import WaitingReason
from zeta_core.contract.job.kind import BACKGROUND_KINDS, JobKind
from zeta_core.contract.job.status import WAITING_SENTENCES, JobStatus, WaitingCode
from zeta_core.contract.spec.resolved_spec import ResolvedResources, ResolvedSpec
from zeta_core.contract.spec.resources import Resources
from zeta_core.contract.wire.messages import Dispatch


async def record_dispatch(
    session: AsyncSession,
    job: JobRow,
    placement: Placement,
    hub: HubAccess,
    inputs: Collection[str] = (),
    *,
    newest_checkpoint: str | None = None,
) -> Sequence[Dispatch]:
    """Dispatch a locked, queued job in this transaction; returns the messages to send after the commit.

    ``hub`` is what the job's project may read from the Hub. ``inputs`` are the keys of its model and data.
    ``newest_checkpoint`` is the newest of the job's own checkpoints, to which its next attempt returns.
    """
    now, nodes = utc_now(), placement.nodes
    requested = job.spec.get("resources") or {}
    resources = Resources.model_validate({**requested, "gpus": placement.gpus, "nodes": len(nodes)})
    assert resources.processes_per_node is not None, "the number of GPUs is known"
    granted = ResolvedSpec(resources=ResolvedResources.model_validate(resources.model_dump()))
    job.resolved_spec = job.resolved_spec.updated(granted)
    resume_from = await own_or_named_checkpoint(session, job, newest_checkpoint)
    bases = await names_of_bases(session, job.project, job.resolved_spec.model, job.spec.get("base"))
    attempt, spec = job.attempt + 1, _spec_to_dispatch(job)
    job.worker, job.slots, job.dispatched_at = nodes[0].candidate.heartbeat.worker, list(placement.slots), now
    if len(nodes) > 1:
        await _start_attempt(session, job, nodes, now)
    else:
        job.waiting_reason = waiting_reason(Wait(WaitingCode.HANDING_OVER, (("worker", job.worker),)), now)
    return [
        Dispatch(
            job_kind=JobKind(job.kind),
            job_id=job.id,
            attempt=attempt,
            worker=node.candidate.heartbeat.worker,
            slots=node.slots,
            project=job.project,
            spec=spec,
            resolved_spec=job.resolved_spec,
            processes=resources.processes_per_node,
            num_nodes=len(nodes),
            node_rank=rank,
            hub=hub,
            resume_from=resume_from,
            bases=bases,
            inputs=sorted(inputs),
        )
        for rank, node in enumerate(nodes)
    ]


async def _start_attempt(session: AsyncSession, job: JobRow, nodes: Sequence[Placement], now: datetime) -> None:
    """Start the attempt of a job on several workers, which then prepare it."""
    workers = [node.candidate.heartbeat.worker for node in nodes]
    job.attempt += 1
    job.started_at = job.started_at or now
    job.not_before = None
    session.add(
        AttemptRow(
            job_id=job.id,
            attempt=job.attempt,
            worker=workers[0],
            incarnation="",  # that of its placement counts
            started_at=now,
            ran_seconds=0.0,  # until all nodes start
            num_nodes=len(nodes),
            is_preparing=True,
        )
    )
    session.add_all(
        PlacementRow(
            job_id=job.id,
            attempt=job.attempt,
            node_rank=rank,
            worker=worker,
            slots=list(node.slots),
            state=PlacementState.DISPATCHED,
        )
        for rank, (worker, node) in enumerate(zip(workers, nodes, strict=True))
    )
    await session.flush()
    message = f"{len(nodes)} workers are preparing the attempt: {', '.join(workers)}."
    started = StatusChange(JobStatus.RUNNING, worker=workers[0], message=message, at=now)
    is_changed = await change_status(session, job, started, expect={JobStatus.QUEUED}, attempt=job.attempt)
    assert is_changed, f"{job.id} is locked and was queued"


def _spec_to_dispatch(job: JobRow) -> dict[str, Any]:
    """The submitted spec with the checkpoint that ``latest`` resolved to and the numbers of GPUs and nodes.

    Only the scheduler uses ``elastic`` and the other fields of ``resources``, and older workers reject unknown fields.
    ``notify`` may contain addresses that are confidential.
    """
    resolved = job.resolved_spec
    assert resolved.resources is not None
    if JobKind(job.kind) in BACKGROUND_KINDS:
        return {**job.spec, "model": resolved.model}
    resources = {name: getattr(resolved.resources, name) for name in ("gpus", "nodes", "processes")}
    spec = {**job.spec, "resources": resources}
    for name in ("notify", "elastic"):
        spec.pop(name, None)
    return spec if resolved.job_model is None else {**spec, "model": resolved.model}


def waiting_reason(wait: Wait, since: datetime, estimated_start_at: datetime | None = None) -> dict[str, Any]:
    """The waiting reason as it is stored in a job's row."""
    return WaitingReason(
        code=wait.code,
        message=wait.message or WAITING_SENTENCES[wait.code],
        since=since,
        details=dict(wait.details),
        estimated_start_at=estimated_start_at,
    ).model_dump(mode="json")
