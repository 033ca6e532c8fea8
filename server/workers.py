"""Lists workers from their heartbeats, reads the usage of their machines, and drains them.

A draining worker gets no new jobs; its jobs save a checkpoint and move to other workers. The state is stored in the
database, so it survives restarts of the worker and of the server until the worker is undrained.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta

from sqlalchemy import select

from server.auth import Caller
from server.database.draining import drained_workers, set_drained
from server.database.pagination import PageQuery, page
from server.database.tables import JobRow
from server.database.usage_table import UsageRow
from server.engine.engine import Engine
from server.engine.usage_history import COARSE, FINE
from server.service import Service
from zeta_core.contract.errors import NotFound
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.machine_usage import GpuUsageCurves, WorkerUsage
from zeta_core.contract.job.responses import DeviceReport, Page, Worker, WorkerSlot
from zeta_core.contract.spec.validation import shown
from zeta_core.contract.wire.messages import Heartbeat


async def list_workers(service: Service, caller: Caller, query: PageQuery) -> Page[Worker]:
    """One page, sorted by name; ``after`` is the last name of the previous page.

    Only an admin key sees the jobs and served models of other projects, and the messages of failing components.
    """
    engine = service.engine
    beats = [beat for beat in engine.workers() if query.after is None or beat.worker > query.after]
    shown_beats = beats[: query.limit]
    jobs = {slot.job_id for beat in shown_beats for slot in beat.all_slots if slot.job_id is not None}
    async with service.database.read() as session:
        drained = await drained_workers(session)
        if not caller.is_admin:
            own = select(JobRow.id).where(JobRow.id.in_(sorted(jobs)), JobRow.project == caller.project)
            jobs = set(await session.scalars(own))
    workers = [_worker(engine, beat, beat.worker in drained, caller, jobs) for beat in shown_beats]
    return page(workers, len(beats) > query.limit, lambda worker: worker.name)


async def set_draining(service: Service, caller: Caller, name: str, draining: bool) -> Worker:
    """Drain or undrain a worker. This is idempotent. Raises `NotFound`."""
    beat = service.engine.heartbeat(name)
    if beat is None:
        raise _not_found(name)
    async with service.database.write() as session:
        await set_drained(session, name, draining, changed_by=caller.key_id)
        session.add(caller.audit_row("worker.drain" if draining else "worker.undrain", name, project=None))
    service.engine.wake()
    jobs = {slot.job_id for slot in beat.all_slots if slot.job_id is not None}
    return _worker(service.engine, beat, draining, caller, jobs)


async def read_usage(service: Service, name: str, hours: int) -> WorkerUsage:
    """The usage of a worker's machine in the last hours. Raises `NotFound`.

    The intervals are short if they are still stored for the whole time.
    """
    span = timedelta(hours=hours)
    resolution = FINE if span <= FINE.kept else COARSE
    is_recent = (UsageRow.interval_seconds == resolution.interval_seconds) & (UsageRow.started_at >= utc_now() - span)
    query = select(UsageRow).where(UsageRow.worker == name, is_recent).order_by(UsageRow.started_at)
    async with service.database.read() as session:
        rows = list(await session.scalars(query))
    beat = service.engine.heartbeat(name)
    if beat is None and not rows:
        raise _not_found(name)
    gpus = {slot.device: slot.name for slot in beat.slots if slot.device is not None} if beat is not None else {}
    by_time = [{gpu["device"]: gpu for gpu in row.gpus} for row in rows]
    devices = dict.fromkeys([*gpus, *(device for usages in by_time for device in usages)])
    return WorkerUsage(
        worker=name,
        interval_seconds=resolution.interval_seconds,
        at=[row.started_at for row in rows],
        cpu=[row.cpu for row in rows],
        memory_bytes=[row.memory_bytes for row in rows],
        gpus=[
            GpuUsageCurves(
                device=device,
                name=gpus.get(device),
                utilization=[usages.get(device, {}).get("utilization") for usages in by_time],
                memory_bytes=[usages.get(device, {}).get("memory_bytes") for usages in by_time],
            )
            for device in devices
        ],
    )


def _not_found(name: str) -> NotFound:
    return NotFound(
        f"Worker {shown(name)} not found; list the workers with `zeta workers` or GET /v1/workers.",
        code="worker_not_found",
    )


def _worker(engine: Engine, beat: Heartbeat, draining: bool, caller: Caller, jobs: Collection[str]) -> Worker:
    """The worker as the caller may see it; ``jobs`` are the ids that are shown."""
    if not engine.is_alive(beat.worker):
        status = "gone"
    elif beat.stopping:
        status = "stopping"
    else:
        status = "draining" if draining else "ready"
    return Worker(
        name=beat.worker,
        host=beat.host,
        status=status,
        draining=draining,
        disk_low=beat.disk_low,
        failing=beat.failing if caller.is_admin else dict.fromkeys(beat.failing, "failing"),
        num_dropped=beat.num_dropped,
        clock_ahead_seconds=engine.clock_ahead_seconds(beat.worker),
        has_own_secret=engine.secrets.is_individual(beat.worker),
        version=beat.version,
        started_at=beat.started_at,
        last_seen_at=engine.last_seen_at(beat.worker) or beat.started_at,
        cores=beat.cores,
        memory_bytes=beat.memory_bytes,
        usage=beat.usage if status != "gone" else None,
        cpu_kind=beat.cpu_kind,
        sandbox=beat.sandbox,
        labels=beat.labels,
        slots=[_slot(slot, caller, is_shown=slot.job_id in jobs) for slot in beat.slots],
        background_slots=[_slot(slot, caller, is_shown=slot.job_id in jobs) for slot in beat.background_slots],
    )


def _slot(device: DeviceReport, caller: Caller, *, is_shown: bool) -> WorkerSlot:
    """The slot, without its job unless it is shown, and with the served models that the caller may see."""
    served = [model.model_dump() for model in device.served if caller.is_admin or model.project == caller.project]
    slot = WorkerSlot.model_validate({**device.model_dump(), "busy": device.job_id is not None, "served": served})
    return slot if is_shown else slot.model_copy(update={"job_id": None, "attempt": None})
