"""A bucket behind a slow line: transfers take long, nothing else waits for them, and killed servers lose nothing."""

import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import httpx
import pytest

from tests.harness.seaweedfs import SeaweedServer
from tests.harness.tcp_relay import TcpRelay
from tests.harness.waiting import wait_until
from tests.server.rows import Rows, some_bytes
from tests.server.server_process import API_KEY, ServerProcess, running_server
from zeta.client import Client
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.run_directory import checkpoint_key
from zeta_core.system.artifact_location import BucketLocation
from zeta_core.system.artifact_store.bucket import BucketStore

CONTENT = b"All the world's a stage.\n" * 800_000  # 20 MB, which are three parts
BYTES_PER_SECOND = 256 << 10  # of each connection


def upload(server: ServerProcess, content: bytes) -> httpx.Response:
    with server.http() as http:
        form = {"purpose": "dataset"}
        return http.post("/v1/files", files={"file": ("a.txt", content)}, data=form, timeout=200)


def announced_keys(server: ServerProcess) -> list[str]:
    with closing(sqlite3.connect(server.home / "zeta.db")) as database:
        return [str(key) for (key,) in database.execute("SELECT key FROM object_removals")]


@pytest.mark.extended
def test_a_server_killed_during_a_slow_upload_leaves_nothing(
    tmp_path: Path, redis_url: str, object_store: SeaweedServer
) -> None:
    bucket, client = object_store.new_bucket(), object_store.client()
    relay = TcpRelay(object_store.port, bytes_per_second=BYTES_PER_SECOND)
    variables = {**object_store.environment(f"http://127.0.0.1:{relay.port}"), "ZETA_ARTIFACTS_URL": f"s3://{bucket}"}

    answers: list[httpx.Response] = []

    def unfinished() -> list[str]:
        return [found["Key"] for found in client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])]

    def lose() -> None:
        with suppress(httpx.TransportError):
            answers.append(upload(server, CONTENT))

    try:
        with running_server(tmp_path, redis_url, None, **variables) as server:
            sending = threading.Thread(target=lose)
            sending.start()
            wait_until(unfinished, 60, "the upload to reach the bucket")
            with server.http() as http:
                began = time.monotonic()
                assert http.get("/v1/files").json()["data"] == []
                assert time.monotonic() - began < 10, "other requests don't wait for the bucket"
            server.end(signal.SIGKILL)
            sending.join()
            assert answers == [], "the server was killed before it could answer"
            assert unfinished() == announced_keys(server), "the upload is known, although its server was killed"
            with closing(sqlite3.connect(server.home / "zeta.db")) as database, database:
                database.execute("UPDATE object_removals SET created_at = '2020-01-01 00:00:00.000000'")
            server.start()
            wait_until(lambda: announced_keys(server) == [], 60, "the abandoned upload to be removed")
            assert unfinished() == []
            assert object_store.keys(bucket) == ["service.json"]
            assert upload(server, b"a small file").status_code == 201
            assert len(object_store.keys(bucket)) == 2
    finally:
        relay.close()


@pytest.mark.slow
def test_a_client_completes_its_download_although_store_and_server_are_killed(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SeaweedServer(tmp_path / "seaweedfs")
    store.start()
    relay = TcpRelay(store.port, bytes_per_second=BYTES_PER_SECOND)
    try:
        bucket = store.new_bucket()
        relayed = {**store.environment(f"http://127.0.0.1:{relay.port}"), "ZETA_ARTIFACTS_URL": f"s3://{bucket}"}
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        with running_server(tmp_path / "home", redis_url, None, **relayed) as server:
            job_id, weights = store_checkpoint(server, BucketStore(tmp_path / "copies", BucketLocation(bucket, "")))
            part = tmp_path / "downloaded" / "model.safetensors.part"

            def received_bytes() -> int:
                return part.stat().st_size if part.exists() else 0

            def wait_for_more() -> None:
                before = received_bytes()
                wait_until(lambda: received_bytes() > before or download.done(), 60, "more of the download")
                assert not download.done(), "it takes 40 seconds"

            with Client(server.url, API_KEY) as client, ThreadPoolExecutor(1) as executor:
                download = executor.submit(client.download, job_id, directory=tmp_path / "downloaded")
                wait_for_more()
                store.kill()
                store.start()
                wait_for_more()
                server.end(signal.SIGKILL)
                server.start()
                wait_for_more()
                download.result(120)
            assert (tmp_path / "downloaded" / "model.safetensors").read_bytes() == weights
    finally:
        relay.close()
        store.stop()


def store_checkpoint(server: ServerProcess, store: BucketStore) -> tuple[str, bytes]:
    """Store the final checkpoint of a new job; returns its id and the weights."""
    rows = Rows(server.settings)
    job_id = rows.job()
    rows.attempt(job_id, to=JobStatus.SUCCEEDED)
    weights = some_bytes(40 * BYTES_PER_SECOND, seed=1)
    rows.checkpoint(job_id, "final", 4, {"model.safetensors": ("weights", weights)})
    store.open_job(job_id)
    store.put_checkpoint(job_id, "final", server.settings.artifacts / checkpoint_key(job_id, "final"))
    return job_id, weights
