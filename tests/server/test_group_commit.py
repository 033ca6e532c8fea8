"""Concurrent submissions share transactions; a failing one doesn't affect the others."""

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Keys
from server.database.access_tables import KeyRow
from server.database.connections import Database
from server.database.tables import DrainRow
from server.submitting.group_commit import MAX_ITEMS, GroupCommit
from tests.server.server_process import SPEC, ServerProcess, error_of, running_server
from zeta_core.contract.errors import AuthenticationFailed, InvalidRequest
from zeta_core.contract.job.events import utc_now


class Drains:
    """Inserts a row per item. It rejects ``invalid``, and ``broken`` fails in the database."""

    def __init__(self, database: Database) -> None:
        self.groups: list[list[str]] = []
        self.commits = GroupCommit[str, str](database, self._insert, key=lambda item: item.partition("/")[0])

    async def _insert(self, session: AsyncSession, items: Sequence[str]) -> Sequence[str | Exception]:
        self.groups.append(list(items))
        for item in items:
            if item != "invalid":
                worker = None if item == "broken" else item
                session.add(DrainRow(worker=worker, created_by="k", created_at=utc_now()))
        return [InvalidRequest("no") if item == "invalid" else item for item in items]

    async def commit(self, *items: str) -> list[str | BaseException]:
        return await asyncio.gather(*(self.commits.commit(item) for item in items), return_exceptions=True)


async def stored(database: Database) -> set[str]:
    async with database.read() as session:
        return set(await session.scalars(select(DrainRow.worker)))


@pytest.mark.anyio
async def test_items_that_arrive_during_a_commit_share_the_next_transaction(database: Database) -> None:
    drains = Drains(database)
    names = [f"w{number}" for number in range(MAX_ITEMS + 6)]
    assert await drains.commit(*names) == names
    assert [len(group) for group in drains.groups] == [MAX_ITEMS, 6]
    assert await stored(database) == set(names)


@pytest.mark.anyio
async def test_a_failing_item_does_not_affect_the_others(database: Database) -> None:
    drains = Drains(database)
    first, invalid, broken, last = await drains.commit("a", "invalid", "broken", "b")
    assert (first, last) == ("a", "b")
    assert isinstance(invalid, InvalidRequest)
    assert isinstance(broken, Exception)
    assert await stored(database) == {"a", "b"}


@pytest.mark.anyio
async def test_items_with_an_equal_key_are_committed_one_after_the_other(database: Database) -> None:
    drains = Drains(database)
    assert await drains.commit("a/1", "a/2", "b/1") == ["a/1", "a/2", "b/1"]
    assert drains.groups == [["a/1", "b/1"], ["a/2"]]


@pytest.mark.anyio
async def test_a_cancelled_request_leaves_the_others_in_its_group(database: Database) -> None:
    drains = Drains(database)
    waiting = [asyncio.create_task(drains.commits.commit(item)) for item in ("a", "b")]
    await asyncio.sleep(0)
    waiting[0].cancel()
    assert await waiting[1] == "b"
    assert "b" in await stored(database)


@pytest.mark.anyio
async def test_a_revoked_key_is_rejected_within_a_second(database: Database) -> None:
    now = 0.0
    keys = Keys(database, lambda: now)
    digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"  # SHA-256 of "test"
    names = {"id": "key_1", "project": "p", "created_by": "test", "name": "n", "scopes": []}
    async with database.write() as session:
        session.add(KeyRow(**names, secret_sha256=digest, created_at=utc_now()))
    assert (await keys.authenticate("test")).key_id == "key_1"
    async with database.write() as session:
        await session.execute(text("UPDATE keys SET revoked_at = created_at"))
    now = 1.0
    with pytest.raises(AuthenticationFailed, match="revoked"):
        await keys.authenticate("test")


@pytest.fixture(params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path: Path, redis_url: str) -> Iterator[ServerProcess]:
    url = str(request.getfixturevalue("postgres_url")) if request.param == "postgresql" else None
    with running_server(tmp_path / "home", redis_url, url) as process:
        yield process


def test_concurrent_valid_invalid_and_repeated_submissions(server: ServerProcess) -> None:
    """Jobs with unknown files are rejected, equal keys create one job, and a reused key is an error, in any mixture."""
    unknown = {**SPEC, "dataset": {"file": "file_" + "0" * 24}}
    bodies = [(SPEC, None), (unknown, None), (unknown, "u"), (SPEC, "k"), (SPEC, "k"), ({**SPEC, "seed": 9}, "k")]

    with server.http() as http:

        def post(number: int) -> httpx.Response:
            body, key = bodies[number % len(bodies)]
            return http.post("/v1/jobs", json=body, headers={"Idempotency-Key": key} if key else {})

        with ThreadPoolExecutor(24) as threads:
            responses = list(threads.map(post, range(8 * len(bodies))))
        listed = {job["id"] for job in http.get("/v1/jobs?limit=100").json()["data"]}
    by_kind = [responses[kind :: len(bodies)] for kind in range(len(bodies))]
    created = {response.json()["id"] for response in by_kind[0]}
    assert len(created) == 8
    for response in (*by_kind[1], *by_kind[2]):
        assert (response.status_code, error_of(response)["details"][0]["code"]) == (422, "file_not_found")
    keyed = [response for response in (*by_kind[3], *by_kind[4], *by_kind[5]) if response.status_code == 201]
    assert len({response.json()["id"] for response in keyed}) == 1
    assert sum("idempotent-replayed" not in response.headers for response in keyed) == 1
    reused = [response for response in (*by_kind[3], *by_kind[4], *by_kind[5]) if response.status_code != 201]
    assert {error_of(response)["code"] for response in reused} == {"idempotency_key_reused"}
    assert listed == created | {keyed[0].json()["id"]}
