"""From heartbeats to the `Worker`s that the API returns."""

from __future__ import annotations

from server.engine.engine import Engine
from server.pages import PageQuery, page
from zeta_core.contract.answers import Page, Worker
from zeta_core.contract.messages import Heartbeat


def list_workers(engine: Engine, asked: PageQuery) -> Page[Worker]:
    """One page by name; ``after`` is the last name of the page before."""
    beats = [beat for beat in engine.workers() if asked.after is None or beat.worker > asked.after]
    workers = [_worker(engine, beat) for beat in beats[: asked.limit]]
    return page(workers, len(beats) > asked.limit, lambda worker: worker.name)


def _worker(engine: Engine, beat: Heartbeat) -> Worker:
    is_alive = engine.is_alive(beat.worker)
    return Worker(
        name=beat.worker,
        host=beat.host,
        status=("stopping" if beat.stopping else "ready") if is_alive else "gone",
        version=beat.version,
        started_at=beat.started_at,
        last_seen_at=engine.last_seen_at(beat.worker) or beat.started_at,
        cores=beat.cores,
        memory_bytes=beat.memory_bytes,
        labels=beat.labels,
        slots=beat.slots,
    )
