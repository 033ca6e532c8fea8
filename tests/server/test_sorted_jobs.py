"""The list of jobs in other orders: every page continues where the previous one ended, whatever has changed since."""

from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import insert, text, update

from server.database.connections import Database
from server.database.tables import JobRow
from server.jobs.sorting import JobOrder, SortedPage, SortPosition, parse_position, read_position, sorted_jobs
from tests.server.test_job_lists import job, recorded, require_index
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.order import JOB_SORTS, SORT_FIELDS, SortField
from zeta_core.contract.job.status import JobStatus

NUM_JOBS = 60


@pytest.fixture
async def database(database: Database) -> Database:
    async with database.write() as session:
        await session.execute(insert(JobRow), [job(number, **progress_of(number)) for number in range(NUM_JOBS)])
    return database


def progress_of(number: int) -> dict[str, Any]:
    """Progress of a job. Several jobs have equal values, and some have none."""
    if number % 5 == 0:
        return {"progress": None}
    loss = {"loss": 1 + 0.1 * (number % 9), "recent_loss": None if number % 2 else 1 + 0.1 * (number % 7)}
    result = {"eval_loss": 1 + 0.1 * (number % 6)} if number % 3 == 0 else None
    progress = {"step": number % 8, "total_steps": 10, "eta_seconds": number % 4 or None, **loss}
    return {"progress": {**progress, "eval_loss": 2.5 if number % 3 == 1 else None}, "result": result}


async def read(database: Database, order: JobOrder, after: SortPosition | None, limit: int) -> SortedPage:
    async with database.read() as session:
        return await sorted_jobs(session, [JobRow.project == "p"], order, after, limit, max_row_bytes=1000)


async def read_all(database: Database, order: JobOrder) -> list[str]:
    """The ids of all jobs, in pages whose links are read again from their text."""
    ids: list[str] = []
    after: SortPosition | None = None
    while True:
        page = await read(database, order, after, 7)
        ids += [row.id for row in page.rows]
        if not page.has_more:
            return ids
        assert page.last is not None
        after = read_position(order.field, page.last.as_text())
        shown = None if page.last.value is None else str(page.last.value)
        assert parse_position(order.field, shown, page.last.id) == after == page.last


@pytest.mark.anyio
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("field", SORT_FIELDS)
async def test_pages_of_every_order_contain_each_job_once(
    database: Database, field: SortField, descending: bool
) -> None:
    order = JobOrder(field, descending)
    ids = await read_all(database, order)
    whole = await read(database, order, None, NUM_JOBS)
    assert ids == [row.id for row in whole.rows]
    assert len(set(ids)) == NUM_JOBS


@pytest.mark.anyio
async def test_the_order_of_creation_is_read_from_an_index(database: Database) -> None:
    order = JobOrder("created", descending=False)
    ids = await read_all(database, order)
    assert ids == (await read_all(database, JobOrder("created", descending=True)))[::-1]
    async with database.write() as session:
        await session.execute(insert(JobRow), [job(number) for number in range(3000)])
    async with database.write() as session:
        await session.execute(text("ANALYZE"))
    first = await read(database, order, None, 10)
    async with database.read() as session:
        with recorded(session) as statements:
            await sorted_jobs(session, [JobRow.project == "p"], order, first.last, 10, max_row_bytes=1000)
        await require_index(session, *statements[0])


@pytest.mark.parametrize(
    "value", ["", ",", ",null,", ',"x"', ",{", ",[1]", ",true", ",NaN", ",1e999", "," + "[" * 10**5]
)
@pytest.mark.parametrize("field", ["created", "loss"])
def test_an_invalid_place_is_rejected_with_the_cure(field: SortField, value: str) -> None:
    with pytest.raises(InvalidRequest, match="next_after of the previous page"):
        read_position(field, new_id("job") + value)


def test_every_field_can_be_sorted_by_in_both_directions() -> None:
    assert set(JOB_SORTS) == {*SORT_FIELDS, *(f"-{field}" for field in SORT_FIELDS)}


@pytest.mark.anyio
async def test_jobs_without_a_value_come_last_in_both_directions(database: Database) -> None:
    for descending in (False, True):
        page = await read(database, JobOrder("loss", descending), None, NUM_JOBS)
        losses = [(row.progress or {}).get("recent_loss") or (row.progress or {}).get("loss") for row in page.rows]
        known = [loss for loss in losses if loss is not None]
        assert losses == known + [None] * (NUM_JOBS // 5)
        assert all((a >= b) if descending else (a <= b) for a, b in pairwise(known))


@pytest.mark.anyio
async def test_a_page_continues_at_the_same_place_after_its_last_job_has_changed(database: Database) -> None:
    order = JobOrder("status", descending=False)
    everything = await read_all(database, order)
    first = await read(database, order, None, 10)
    assert first.last is not None
    async with database.write() as session:
        changed = update(JobRow).where(JobRow.id == first.last.id).values(status=JobStatus.CANCELLED)
        await session.execute(changed)
    following = await read(database, order, first.last, 10)
    assert [row.id for row in following.rows] == everything[10:20]
