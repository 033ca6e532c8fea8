"""Delegates spec checks that need torch and transformers to a worker, and caches the results.

Any server may receive the result from the workers' stream, so results are stored in the database under the SHA-256 of
the request, and reused for `CACHE_SECONDS`. A caller waits for a limited time; after that it gets the reason why there
is no result. The worker has more time, and a repeated request finds the result that it has stored by then.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.connections import Database
from server.database.model_bases import names_of_bases
from server.database.tables import CheckRow
from server.engine.apply_journal import sanitize
from server.engine.known_workers import KnownWorkers
from server.engine.redis_client import SendToWorker
from zeta_core.contract.access import HubAccess
from zeta_core.contract.job.check import CheckAnswer
from zeta_core.contract.job.data_preview import RowSelection
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.wire.messages import CHECK_VERSION, CheckRequest, CheckResult, Heartbeat
from zeta_core.system.redis_access import RedisUnavailable

CACHE_SECONDS = 3600.0  # a Hub repository named without a revision may change
POLL_SECONDS = 0.1
MAX_OPEN_PER_PROJECT = 16  # each of them queries the database several times a second
WORKER_FACTOR = 4.0  # the worker's time limit as a multiple of the caller's: loading libraries can be slow


class SpecChecks:
    def __init__(
        self, database: Database, workers: KnownWorkers, send_to_worker: SendToWorker, *, limit_seconds: float
    ) -> None:
        self._database = database
        self._workers = workers
        self._send_to_worker = send_to_worker
        self._limit_seconds = limit_seconds
        self._open: Counter[str] = Counter()  # requests by project

    async def request(
        self,
        project: str,
        spec: dict[str, Any],
        resolved_spec: ResolvedSpec,
        processes: int,
        *,
        hub: HubAccess,
        reuse: bool = True,
        shown: RowSelection | None = None,
    ) -> CheckAnswer | str:
        """A worker's check result for the spec, or the reason why there is none. With ``shown``, only these rows.

        ``hub`` is what the project may read from the Hub. ``reuse`` is false if the data of the spec may have changed
        since an earlier check.
        """
        if self._open[project] >= MAX_OPEN_PER_PROJECT:
            return f"Project {project!r} already has {MAX_OPEN_PER_PROJECT} checks in progress; try again."
        self._open[project] += 1
        try:
            return await self._request(project, spec, resolved_spec, processes, hub=hub, reuse=reuse, shown=shown)
        finally:
            self._open[project] -= 1

    async def _request(
        self,
        project: str,
        spec: dict[str, Any],
        resolved_spec: ResolvedSpec,
        processes: int,
        *,
        hub: HubAccess,
        reuse: bool,
        shown: RowSelection | None,
    ) -> CheckAnswer | str:
        spec = {name: value for name, value in spec.items() if name != "notify"}  # its addresses may be confidential
        async with self._database.read() as session:
            bases = await names_of_bases(session, project, resolved_spec.model)
        identity: list[Any] = [project, spec, resolved_spec.as_json(), processes, hub, bases]
        if shown is not None:
            identity.append(shown.model_dump())
        request_json = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        check_id = hashlib.sha256(request_json.encode()).hexdigest()
        now = utc_now()
        earlier = await self._stored_result(check_id, now - timedelta(seconds=CACHE_SECONDS)) if reuse else None
        if isinstance(earlier, CheckAnswer):
            return earlier
        worker = await self._choose(check_id)
        if worker is None:
            return "No connected worker can check the spec."
        request = CheckRequest(
            check_id=check_id,
            project=project,
            spec=spec,
            resolved_spec=resolved_spec,
            processes=processes,
            hub=hub,
            limit_seconds=WORKER_FACTOR * self._limit_seconds,
            bases=bases,
            shown=shown,
        )
        async with self._database.write() as session:
            await session.merge(CheckRow(id=check_id, worker=worker.worker, answer=None, failure=None, created_at=now))
        try:
            await self._send_to_worker(worker.worker, request)
        except RedisUnavailable:
            return "Redis is unreachable, so no worker can check the spec."
        deadline = time.monotonic() + self._limit_seconds
        while time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
            result = await self._stored_result(check_id, now)
            if result is not None:
                return result
        limit = f"{self._limit_seconds:g} s (ZETA_CHECK_SECONDS)"
        return f"Worker {worker.worker} did not answer within {limit}; try again."

    async def _choose(self, check_id: str) -> Heartbeat | None:
        """The worker that was asked before and hasn't answered yet, or the one with the most free slots."""
        capable = [
            beat
            for beat in self._workers.workers()
            if self._workers.is_alive(beat.worker) and not beat.stopping and beat.contract_version >= CHECK_VERSION
        ]
        async with self._database.read() as session:
            row = await session.get(CheckRow, check_id)
        asked = row.worker if row is not None and row.answer is None and row.failure is None else None
        return max(
            capable,
            key=lambda beat: (beat.worker == asked, sum(slot.job_id is None for slot in beat.slots)),
            default=None,
        )

    async def _stored_result(self, check_id: str, since: datetime) -> CheckAnswer | str | None:
        async with self._database.read() as session:
            row = await session.get(CheckRow, check_id)
        if row is None or row.created_at < since or (row.answer is None and row.failure is None):
            return None
        return row.failure if row.answer is None else CheckAnswer.model_validate(row.answer)


async def store_result(session: AsyncSession, result: CheckResult) -> bool:
    """Store a worker's check result, and delete expired ones; returns whether that worker was asked for it."""
    now = utc_now()
    answer = sanitize(result.answer.model_dump(mode="json")) if result.answer is not None else None
    failure = sanitize(result.failure) or ("The worker returned no result." if answer is None else None)
    await session.execute(delete(CheckRow).where(CheckRow.created_at < now - timedelta(seconds=CACHE_SECONDS)))
    row = await session.get(CheckRow, result.check_id, with_for_update=True)
    if row is None or row.worker != result.worker:
        return False
    row.answer, row.failure, row.created_at = answer, failure, now
    return True
