"""Lists workers from their heartbeats, and drains them.

A draining worker gets no new jobs; its jobs save a checkpoint and move to other workers. The state is stored in the
database, so it survives restarts of the worker and of the server until the worker is undrained.
"""

from __future__ import annotations

from server.auth import ADMIN_SCOPE, Caller
from server.database.draining import drained_workers, set_drained
from server.database.pagination import PageQuery, page
from server.engine.engine import Engine
from server.service import Service
from zeta_core.contract.errors import NotFound, PermissionDenied
from zeta_core.contract.job.responses import Page, Worker
from zeta_core.contract.spec.validation import shown
from zeta_core.contract.wire.messages import Heartbeat


async def list_workers(service: Service, query: PageQuery) -> Page[Worker]:
    """One page, sorted by name; ``after`` is the last name of the previous page."""
    async with service.database.read() as session:
        drained = await drained_workers(session)
    engine = service.engine
    beats = [beat for beat in engine.workers() if query.after is None or beat.worker > query.after]
    workers = [_worker(engine, beat, beat.worker in drained) for beat in beats[: query.limit]]
    return page(workers, len(beats) > query.limit, lambda worker: worker.name)


async def set_draining(service: Service, caller: Caller, name: str, draining: bool) -> Worker:
    """Drain or undrain a worker. This is idempotent.

    Raises `PermissionDenied` for a key without the scope ``admin``, and `NotFound`.
    """
    if ADMIN_SCOPE not in caller.scopes:
        raise PermissionDenied(
            "This API key lacks the 'admin' scope, which is required to drain workers; use a key that has it."
        )
    beat = next((beat for beat in service.engine.workers() if beat.worker == name), None)
    if beat is None:
        raise NotFound(
            f"Worker {shown(name)} not found; list the workers with `zeta workers` or GET /v1/workers.",
            code="worker_not_found",
        )
    async with service.database.write() as session:
        await set_drained(session, name, draining, changed_by=caller.key_id)
    service.engine.wake()
    return _worker(service.engine, beat, draining)


def _worker(engine: Engine, beat: Heartbeat, draining: bool) -> Worker:
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
        failing=beat.failing,
        num_dropped=beat.num_dropped,
        version=beat.version,
        started_at=beat.started_at,
        last_seen_at=engine.last_seen_at(beat.worker) or beat.started_at,
        cores=beat.cores,
        memory_bytes=beat.memory_bytes,
        cpu_kind=beat.cpu_kind,
        labels=beat.labels,
        slots=beat.slots,
    )
