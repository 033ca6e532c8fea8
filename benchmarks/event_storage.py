"""Events stored per second, relative to a bulk insert of the same rows by hand.

Both store batches of the size that a worker publishes, one transaction each, in the same SQLite database, in turn.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from benchmarks.result import ZETA, BenchmarkResult, ratio_of_rounds
from benchmarks.workload import Size
from migrations.upgrade import upgrade
from server.database.connections import Database
from server.database.tables import AttemptRow, EventRow, JobRow
from server.database.transitions import StatusChange, change_status, create_jobs
from server.engine.apply_journal import apply_batch
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.messages import MAX_BATCH_LINES, JournalBatch
from zeta_core.system.database_url import sqlite_url

BY_HAND = "bulk insert by hand"
BATCHES = 15  # in each round
BULK_INSERT = insert(EventRow.metadata.tables[EventRow.__tablename__])  # faster than with the class
FIELDS: dict[str, Any] = {
    "phase": "training",
    "total_steps": 100_000,
    "epoch": 0.5,
    "tokens": 1_000_000,
    "loss": 2.5,
    "learning_rate": 1e-4,
    "grad_norm": 1.0,
    "tokens_per_second": 1000.0,
    "eta_seconds": 100.0,
}


async def _running_job(database: Database, now: datetime) -> str:
    job = JobRow(
        id=new_id("job"),
        project="p",
        created_by="k",
        spec={},
        resolved_spec_json={},
        priority=0,
        max_retries=3,
        created_at=now,
        job_metadata={},
    )
    async with database.write() as session:
        await create_jobs(session, [job])
        session.add(AttemptRow(job_id=job.id, attempt=1, worker="w", incarnation="i", started_at=now, stored_line=0))
        job.attempt = 1
        await session.flush()
        await change_status(session, job, StatusChange(JobStatus.RUNNING), expect={JobStatus.QUEUED}, attempt=1)
    return job.id


async def _measure(size: Size, url: str) -> dict[str, list[float]]:
    database, now = Database(url), utc_now()
    rates: dict[str, list[float]] = {ZETA: [], BY_HAND: []}
    job_id, other = [await _running_job(database, now) for _ in range(2)]
    sent = {"type": "progress", "created_at": now.isoformat(), **FIELDS}
    row = {"job_id": other, "attempt": 1, "line": None, "type": "progress", "created_at": now}

    async def store(first: int) -> None:
        numbers = range(first, first + MAX_BATCH_LINES)
        lines = [{**sent, "step": number} for number in numbers]
        batch = JournalBatch(job_id=job_id, attempt=1, worker="w", first_line=first, lines=lines)
        async with database.write() as session:
            applied = await apply_batch(session, batch, max_events=10**9)
        assert applied.num_applied == MAX_BATCH_LINES

    async def insert_by_hand(first: int) -> None:
        numbers = range(first, first + MAX_BATCH_LINES)
        rows = [{**row, "seq": 10 + number, "fields": {**FIELDS, "step": number}} for number in numbers]
        async with database.write() as session:
            await session.execute(BULK_INSERT, rows)

    first = 1
    for turn in range(size.rounds + 1):
        seconds = dict.fromkeys(rates, 0.0)
        num_batches = size.of(BATCHES, 2)
        for _ in range(num_batches):
            for name, act in ((ZETA, store), (BY_HAND, insert_by_hand)):
                began = time.perf_counter()
                await act(first)
                seconds[name] += time.perf_counter() - began
            first += MAX_BATCH_LINES
        if turn:
            for name in rates:
                rates[name].append(num_batches * MAX_BATCH_LINES / seconds[name])
    await database.close()
    return rates


def measure(size: Size) -> BenchmarkResult:
    with tempfile.TemporaryDirectory() as folder:
        url = sqlite_url(Path(folder) / "zeta.db")
        upgrade(url)
        rates = asyncio.run(_measure(size, url))
    return BenchmarkResult(
        title="Events stored, relative to a bulk insert by hand",
        unit="events/s",
        figures=rates,
        ratio=ratio_of_rounds(rates[ZETA], rates[BY_HAND]),
        target=0.5,
        target_is="minimum",
        notes=f"Progress lines in batches of {MAX_BATCH_LINES}, parsed, numbered and applied to the job.",
    )
