"""Lists and counts of many jobs: every filter uses an index, and the counts agree with the jobs."""

import asyncio
import random
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import delete, event, func, insert, select, text
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.connections import Database
from server.database.file_tables import FileRow
from server.database.job_counts import jobs_by_project, merge_counts, queued_by_priority
from server.database.pagination import OrderedQuery, PageQuery, newest_first
from server.database.tables import JobCountRow, JobRow
from server.jobs.queries import JobQuery, matching_jobs
from server.jobs.serialization import NEAR_END, NEAR_FRONT, to_jobs
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.spec.resolved_spec import ResolvedSpec

NUM_JOBS = 3000
START = datetime(2026, 1, 1, tzinfo=UTC)
STATUSES = (JobStatus.SUCCEEDED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.QUEUED, JobStatus.RUNNING)


def job(number: int, **values: Any) -> dict[str, Any]:
    return {
        "id": new_id("job"),
        "project": "p",
        "created_by": "k",
        "status": STATUSES[number % len(STATUSES)],
        "entity_name": f"name-{number % 7}",
        "spec": {},
        "resolved_spec_json": ResolvedSpec(files={}).as_json(),
        "priority": number % 3,
        "max_retries": 3,
        "created_at": START + timedelta(seconds=number // 2),
        "job_metadata": {"team": f"t{number % 11}", "batch": f"b{number % 2}"},
        **values,
    }


async def fill(database: Database) -> None:
    async with database.write() as session:
        await session.execute(insert(JobRow), [job(number) for number in range(NUM_JOBS)])
        files = {"project": "p", "created_by": "k", "filename": "f", "bytes": 1, "purpose": "dataset"}
        rows = [
            {**files, "id": new_id("file"), "sha256": f"s{number % 9}", "created_at": START + timedelta(number)}
            for number in range(NUM_JOBS)
        ]
        await session.execute(insert(FileRow), rows)
    async with database.write() as session:
        await session.execute(text("ANALYZE"))


@contextmanager
def recorded(session: AsyncSession) -> Generator[list[tuple[str, Any]]]:
    """The statements that the session executes in this block, with their parameters."""
    statements: list[tuple[str, Any]] = []

    def record(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        if statement.startswith("SELECT"):
            statements.append((statement, parameters))

    engine = session.get_bind().engine
    event.listen(engine, "before_cursor_execute", record)
    try:
        yield statements
    finally:
        event.remove(engine, "before_cursor_execute", record)


async def plan_of(session: AsyncSession, statement: str, parameters: Any) -> str:
    """The plan; PostgreSQL's without bitmaps, which it prefers for few rows and then sorts."""

    def explain(connection: Connection) -> str:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL enable_bitmapscan = off")
        prefix = "EXPLAIN QUERY PLAN " if connection.dialect.name == "sqlite" else "EXPLAIN "
        return "\n".join(str(row[-1]) for row in connection.exec_driver_sql(prefix + statement, parameters))

    return await (await session.connection()).run_sync(explain)


async def require_index(session: AsyncSession, statement: str, parameters: Any) -> None:
    """Fail if the statement scans a table, or sorts more than the merged pages of several indexes."""
    plan = await plan_of(session, statement, parameters)
    scans = [line for line in plan.splitlines() if line.strip().startswith("SCAN jobs") or "Seq Scan on" in line]
    assert scans == [], plan
    if " UNION ALL " not in statement and "ORDER BY" in statement:
        assert "TEMP B-TREE" not in plan, plan
        assert "Sort" not in plan, plan


FILTERS: list[dict[str, Any]] = [
    {},
    {"status": ["failed"]},
    {"status": ["failed", "queued"]},
    {"entity_name": "name-3"},
    {"entity_name": "missing"},
    {"entity_name": "name-3", "status": ["succeeded"]},
    {"metadata[team]": "t4"},
    {"metadata[team]": "missing"},
    {"metadata[team]": "t4", "metadata[batch]": "b1", "status": ["failed", "succeeded"], "entity_name": "name-5"},
]


@pytest.mark.anyio
async def test_every_list_reads_its_pages_from_an_index(database: Database) -> None:
    await fill(database)
    async with database.read() as session:
        everything = list(await session.scalars(select(JobRow)))
        everything.sort(key=lambda row: (row.created_at, row.id), reverse=True)
        for filters in FILTERS:
            expected = [row.id for row in everything if matches(row, filters)]
            query = JobQuery(limit=60, **filters)
            found: list[str] = []
            while True:
                with recorded(session) as statements:
                    size = func.length(JobRow.id)
                    rows, has_more = await newest_first(
                        session, JobRow, matching_jobs("p", query), query, project="p", size=size
                    )
                for statement, parameters in statements:
                    await require_index(session, statement, parameters)
                found += [row.id for row in rows]
                if not has_more or len(found) > 400:
                    break
                query = query.model_copy(update={"after": found[-1]})
            assert found == expected[: len(found)], filters
            assert has_more or len(found) == len(expected), filters


def matches(row: JobRow, filters: dict[str, Any]) -> bool:
    metadata = {name[9:-1]: value for name, value in filters.items() if name.startswith("metadata[")}
    return (
        row.status in filters.get("status", [row.status])
        and row.entity_name == filters.get("entity_name", row.entity_name)
        and metadata.items() <= row.job_metadata.items()
    )


@pytest.mark.anyio
@pytest.mark.parametrize("sha256", [None, "s4", "missing"])
async def test_lists_of_files_read_their_pages_from_an_index(database: Database, sha256: str | None) -> None:
    await fill(database)
    query = select(FileRow).where(FileRow.project == "p")
    query = query if sha256 is None else query.where(FileRow.sha256 == sha256)
    async with database.read() as session:
        with recorded(session) as statements:
            await newest_first(
                session, FileRow, [OrderedQuery(query, FileRow.created_at, FileRow.id)], PageQuery(), project="p"
            )
        for statement, parameters in statements:
            await require_index(session, statement, parameters)


@pytest.mark.anyio
async def test_queue_positions_are_exact_anywhere_in_a_long_queue(database: Database) -> None:
    await fill(database)
    async with database.write() as session:  # more jobs of one priority than are numbered from either end
        more = [job(number, status="queued", priority=1) for number in range(2 * (NEAR_FRONT + NEAR_END))]
        await session.execute(insert(JobRow), more)
    order = (JobRow.priority.desc(), JobRow.created_at, JobRow.id)
    async with database.read() as session:
        queue = list(await session.scalars(select(JobRow).where(JobRow.status == "queued").order_by(*order)))
        middle = len(queue) // 2  # more than `NEAR_FRONT` and `NEAR_END` from the jobs of other priorities
        wanted = [*queue[:3], *queue[100:103], *queue[middle : middle + 3], queue[middle + 40], *queue[-3:]]
        jobs = await to_jobs(session, wanted)
    assert [found.queue_position for found in jobs] == [queue.index(row) + 1 for row in wanted]


@pytest.mark.anyio
async def test_counts_agree_with_the_jobs_after_random_changes(database: Database) -> None:
    """Changes by several connections, rolled back ones included, while the counts are merged."""
    random_ = random.Random(5)
    ids = [new_id("job") for _ in range(60)]

    async def change(number: int) -> None:
        async with database.write() as session:
            if number < len(ids):
                await session.execute(insert(JobRow), [job(number, id=ids[number])])
        chosen = random_.choice(ids)
        try:
            async with database.write() as session:
                row = await session.get(JobRow, chosen, with_for_update=True)
                if row is None:
                    return
                row.status = random_.choice(list(JobStatus))
                await session.flush()
                if random_.random() < 0.2:
                    raise ZeroDivisionError
                if random_.random() < 0.1:
                    await session.execute(delete(JobRow).where(JobRow.id == chosen))
        except ZeroDivisionError:
            pass

    for start in range(0, 200, 8):
        merges = [merge_counts(database, max_rows=0) for _ in range(2)]
        await asyncio.gather(*(change(start + offset) for offset in range(8)), *merges)
    async with database.read() as session:
        rows = await session.execute(select(JobRow.status, func.count()).group_by(JobRow.status))
        by_status = {("p", status): count for status, count in rows}
        queued = Counter(await session.scalars(select(JobRow.priority).where(JobRow.status == "queued")))
        assert {key: count for key, count in (await jobs_by_project(session)).items() if count} == by_status
        assert {
            priority: count for priority, count in (await queued_by_priority(session, "p")).items() if count
        } == queued
    await merge_counts(database, max_rows=0)
    async with database.read() as session:
        assert {key: count for key, count in (await jobs_by_project(session)).items() if count} == by_status
        assert (await session.scalar(select(func.count()).select_from(JobCountRow)) or 0) <= len(JobStatus) * 3
