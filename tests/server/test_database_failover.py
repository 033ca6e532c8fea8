"""The service outlives the loss of its PostgreSQL server when a standby with synchronous replication is promoted."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness.children import start_child, stop_child
from tests.harness.fleet import SMALL_WORKER
from tests.harness.postgres import PostgresServer, PostgresUnavailable
from tests.harness.service import clean_environment
from tests.harness.waiting import wait_until
from tests.server.server_process import REPOSITORY, SECRET, SPEC, ServerProcess, running_server

FAILOVER_SECONDS = 30.0


@pytest.fixture
def cluster() -> Iterator[tuple[PostgresServer, PostgresServer]]:
    """A PostgreSQL server and its synchronous standby."""
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's own folders are closed to other accounts
    folder.chmod(0o755)
    servers: list[PostgresServer] = []
    try:
        for name in ("primary", "standby"):
            (folder / name).mkdir()
        try:
            primary = PostgresServer(folder / "primary", synchronous=True)
            servers.append(primary)
            primary.start()
        except PostgresUnavailable as error:
            pytest.skip(str(error))
        standby = primary.start_standby(folder / "standby")
        servers.append(standby)
        yield primary, standby
    finally:
        for server in servers:
            server.stop()
        shutil.rmtree(folder)


class Submitter:
    """Submits jobs one after the other from a thread, until `stop`. ``accepted`` are the ids of those answered 201."""

    def __init__(self, server: ServerProcess) -> None:
        self.accepted: list[tuple[str, float]] = []  # ids, and when the answer arrived (monotonic)
        self.refused: list[int] = []
        self._server = server
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with self._server.http() as http:
            while not self._stopped.wait(0.1):
                answer = http.post("/v1/jobs", json={**SPEC, "resources": {"labels": {"never": "matches"}}})
                if answer.status_code == 201:
                    self.accepted.append((answer.json()["id"], time.monotonic()))
                else:
                    self.refused.append(answer.status_code)


@pytest.mark.extended
def test_a_promoted_standby_continues_jobs_events_and_submissions(
    tmp_path: Path, redis_url: str, cluster: tuple[PostgresServer, PostgresServer]
) -> None:
    primary, standby = cluster
    url = primary.url("postgres").replace(f":{primary.port}/", f":{primary.port},127.0.0.1:{standby.port}/")
    database_url = f"{url}?target_session_attrs=read-write"
    with (
        running_server(tmp_path / "home", redis_url, database_url) as server,
        server.http() as http,
        _running_worker(tmp_path, server, redis_url),
    ):
        job_id = _start_job(http)
        submitter = Submitter(server)
        wait_until(lambda: len(submitter.accepted) >= 3, 60, "the first submissions")
        lost_at = time.monotonic()
        primary.crash()
        standby.promote()
        wait_until(lambda: submitter.accepted[-1][1] > lost_at + 1, 60, "a submission after the failover")
        first_after = next(at for _, at in submitter.accepted if at > lost_at)
        submitter.stop()
        assert first_after - lost_at < FAILOVER_SECONDS
        assert set(submitter.refused) <= {503}
        for accepted, _ in submitter.accepted:
            assert http.get(f"/v1/jobs/{accepted}").json()["status"] == "queued"
        job: dict[str, Any] = {}

        def has_ended() -> bool:
            job.update(http.get(f"/v1/jobs/{job_id}").json())
            return job["status"] not in ("queued", "running")

        wait_until(has_ended, 90, "the job to end")
        assert (job["status"], job["attempt"]) == ("succeeded", 1), job
        events = http.get(f"/v1/jobs/{job_id}/events?limit=1000").json()["data"]
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        steps = [event["step"] for event in events if event["type"] == "progress"]
        assert steps == sorted(set(steps)), "no step is stored twice"


@contextmanager
def _running_worker(folder: Path, server: ServerProcess, redis_url: str) -> Generator[None]:
    environment = {
        **clean_environment(),
        "PYTHONPATH": str(REPOSITORY),
        "ZETA_HOME": str(server.home),
        "ZETA_REDIS_URL": redis_url,
        "ZETA_WORKER_SECRET": SECRET,
        "ZETA_WORKER_NAME": "w1",
    }
    worker = start_child([sys.executable, SMALL_WORKER], log_file=folder / "worker.log", environment=environment)
    try:
        yield
    finally:
        stop_child(worker, stop_signal=signal.SIGTERM)


def _start_job(http: httpx.Client) -> str:
    """Submit a job of 150 steps; returns when it has made some."""
    metadata = {"steps": "150", "seconds_per_step": "0.1", "checkpoint_every": "50"}
    job_id = str(http.post("/v1/jobs", json={**SPEC, "metadata": metadata}).json()["id"])

    def has_begun() -> bool:
        progress: dict[str, Any] = http.get(f"/v1/jobs/{job_id}").json()["progress"] or {}
        return progress.get("step", 0) >= 3

    wait_until(has_begun, 90, "some steps")
    return job_id
