"""The open event streams and followed logs of a key and of a project are limited, and others are not slowed down."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.rows import Rows
from tests.server.server_process import ServerProcess, error_of, running_server
from zeta import Client
from zeta_core.contract.job.status import JobStatus

STREAM = {"Accept": "text/event-stream"}
MAX_PER_KEY, MAX_PER_PROJECT = 3, 5
NUM_HOSTILE_STREAMS = 3000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, shared_valkey: ValkeyServer) -> Iterator[ServerProcess]:
    limits = {"ZETA_KEY_MAX_STREAMS": str(MAX_PER_KEY), "ZETA_PROJECT_MAX_STREAMS": str(MAX_PER_PROJECT)}
    with running_server(tmp_path_factory.mktemp("server"), shared_valkey.second_url, **limits) as process:
        yield process


def new_key(http: httpx.Client, project: str) -> str:
    created = http.post("/v1/keys", json={"name": "n", "project": project, "scopes": ["submit"]})
    return str(created.raise_for_status().json()["key"])


@contextmanager
def open_streams(http: httpx.Client, job_id: str, count: int, path: str = "events") -> Generator[None]:
    """Hold this many streams of the job open."""
    with ExitStack() as opened:
        for _ in range(count):
            response = opened.enter_context(http.stream("GET", f"/v1/jobs/{job_id}/{path}", headers=STREAM))
            assert response.status_code == 200
        yield


def open_another(http: httpx.Client, job_id: str, path: str = "events") -> httpx.Response:
    """The response to one more stream; the body only of a refusal."""
    with http.stream("GET", f"/v1/jobs/{job_id}/{path}", headers=STREAM) as response:
        if response.status_code != 200:
            response.read()
        return response


@pytest.mark.extended
@pytest.mark.parametrize("path", ["events", "logs?follow=true"])
def test_one_stream_above_the_limit_of_a_key_is_refused_until_another_ends(
    server: ServerProcess, http: httpx.Client, rows: Rows, path: str
) -> None:
    project = "streams" if path == "events" else "logs"
    key, job_id = new_key(http, project), rows.job(project=project)
    with server.http(key) as member, server.http(new_key(http, project)) as colleague:
        with open_streams(member, job_id, MAX_PER_KEY, path):
            refused = open_another(member, job_id, path)
            assert (refused.status_code, error_of(refused)["code"]) == (429, "too_many_streams")
            assert int(refused.headers["retry-after"]) > 0
            assert member.get(f"/v1/jobs/{job_id}/events").status_code == 200
            assert open_another(colleague, job_id, path).status_code == 200
        wait_until(lambda: open_another(member, job_id, path).status_code == 200, 10, "a stream to be free")


def test_the_keys_of_a_project_share_its_limit(server: ServerProcess, http: httpx.Client, rows: Rows) -> None:
    job_id, other_job = rows.job(project="shared"), rows.job(project="other")
    with (
        server.http(new_key(http, "shared")) as first,
        server.http(new_key(http, "shared")) as second,
        server.http(new_key(http, "other")) as other,
        open_streams(first, job_id, MAX_PER_KEY),
        open_streams(second, job_id, MAX_PER_PROJECT - MAX_PER_KEY),
    ):
        refused = open_another(second, job_id)
        assert (refused.status_code, error_of(refused)["code"]) == (429, "too_many_streams")
        assert "max_streams" in error_of(refused)["message"]
        assert open_another(other, other_job).status_code == 200


def test_streams_of_the_dashboard_count(server: ServerProcess, http: httpx.Client, rows: Rows) -> None:
    key, job_id = new_key(http, "pages"), rows.job(project="pages")
    with httpx.Client(base_url=server.url, timeout=30) as browser, server.http(key) as program:
        assert browser.post("/login", data={"key": key}).status_code == 303
        with open_streams(browser, job_id, MAX_PER_KEY):
            assert open_another(browser, job_id).status_code == 429
            assert open_another(program, job_id).status_code == 429


def test_refused_and_unknown_streams_hold_nothing(server: ServerProcess, http: httpx.Client, rows: Rows) -> None:
    key, job_id = new_key(http, "refused"), rows.job(project="refused")
    with server.http(key) as member:
        for _ in range(2 * MAX_PER_KEY):
            assert open_another(member, "job_00000000000000000000000000").status_code == 404
            invalid = member.get(f"/v1/jobs/{job_id}/events", headers={**STREAM, "Last-Event-ID": "x"})
            assert invalid.status_code == 422
            assert member.head(f"/v1/jobs/{job_id}/events", headers=STREAM).status_code == 200
        assert open_another(member, job_id).status_code == 200


def test_a_client_above_the_limit_polls_the_stored_events(
    server: ServerProcess, http: httpx.Client, rows: Rows
) -> None:
    key, job_id = new_key(http, "polling"), rows.job(project="polling")
    rows.attempt(job_id, progress=[{"phase": "training", "step": 1}], to=JobStatus.SUCCEEDED)
    waiting = rows.job(project="polling")
    with (
        server.http(key) as member,
        open_streams(member, waiting, MAX_PER_KEY),
        Client(server.url, key) as client,
    ):
        assert any(event.type == "progress" for event in client.events(job_id))


@pytest.mark.slow
def test_3000_streams_of_one_project_do_not_make_others_wait(tmp_path: Path, redis_url: str) -> None:
    with running_server(tmp_path / "home", redis_url) as server, server.http() as http:
        key, job_id = new_key(http, "hostile"), Rows(server.settings).job(project="hostile")
        statuses, waits = asyncio.run(_attack(server, key, job_id))
        assert statuses.count(200) == 200
        assert statuses.count(429) == NUM_HOSTILE_STREAMS - 200
        assert statistics.median(waits) < 1, waits


async def _attack(server: ServerProcess, key: str, job_id: str) -> tuple[list[int], list[float]]:
    """Open all streams while another user lists jobs; returns the streams' statuses, and that user's waits in seconds.

    The user also lists jobs while all streams are open.
    """
    request = (
        f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n"
        f"Authorization: Bearer {key}\r\n\r\n"
    )
    writers: list[asyncio.StreamWriter] = []
    connecting = asyncio.Semaphore(100)

    async def open_one() -> int:
        async with connecting:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writers.append(writer)
            writer.write(request.encode())
            return int((await reader.readline()).split()[1])

    waits: list[float] = []
    attack = asyncio.gather(*(open_one() for _ in range(NUM_HOSTILE_STREAMS)))
    with server.http() as other:
        num_after = 0
        while not attack.done() or (num_after := num_after + 1) <= 20:
            started = time.monotonic()
            response = await asyncio.to_thread(other.get, "/v1/jobs")
            assert response.status_code == 200
            waits.append(time.monotonic() - started)
    statuses = await attack
    for writer in writers:
        writer.close()
    return statuses, waits
