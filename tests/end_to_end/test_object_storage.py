"""A server and a worker that share no folder, only the bucket of a real S3 server."""

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.specs import PYTHON_REFERENCE, as_jsonl, tiny_job
from tests.harness.children import start_child, stop_child
from tests.harness.seaweedfs import SeaweedServer
from tests.harness.service import ZETA, clean_environment, wait_for_end
from tests.harness.tcp_relay import TcpRelay
from tests.harness.waiting import wait_until
from tests.server.server_process import REPOSITORY, SECRET, ServerProcess, running_server
from zeta_core.contract.identifiers import new_id


class Machines:
    """A server and a worker with homes of their own, which use one bucket."""

    def __init__(self, folder: Path, redis_url: str, object_store: SeaweedServer, url: str | None = None) -> None:
        """``url`` is another address of the store."""
        self.object_store = object_store
        self.bucket = object_store.new_bucket()
        self.variables = {**object_store.environment(url), "ZETA_ARTIFACTS_URL": f"s3://{self.bucket}/zeta"}
        self.worker_home = folder / "worker"
        self.worker_log = folder / "worker.log"
        self.server = ServerProcess(folder / "server", redis_url, None, **self.variables)
        self._redis_url = redis_url
        self._worker: subprocess.Popen[bytes] | None = None

    def start_worker(self) -> None:
        environment = {
            **clean_environment(),
            **self.variables,
            "PYTHONPATH": str(REPOSITORY),
            "ZETA_HOME": str(self.worker_home),
            "ZETA_REDIS_URL": self._redis_url,
            "ZETA_WORKER_SECRET": SECRET,
            "ZETA_WORKER_NAME": "elsewhere",
        }
        command = [sys.executable, "-m", "worker"]
        self._worker = start_child(command, log_file=self.worker_log, environment=environment)

    def end_worker(self, how: signal.Signals) -> None:
        assert self._worker is not None
        stop_child(self._worker, stop_signal=how)
        self._worker = None

    def stored_keys(self) -> list[str]:
        return [key.removeprefix("zeta/") for key in self.object_store.keys(self.bucket)]

    def differences(self) -> list[dict[str, Any]]:
        """The result of `zeta artifacts check` with hashes, on the server's machine."""
        done = subprocess.run(
            [ZETA, "artifacts", "check", "--hash", "--json", "--home", self.server.home],
            env={**clean_environment(), **self.variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not done.stderr, done.stderr
        differences: list[dict[str, Any]] = json.loads(done.stdout)["differences"]
        assert done.returncode == bool(differences)
        return differences

    def logs(self) -> str:
        return f"{self.server.log()}\n{self.worker_log.read_text()}"

    @contextmanager
    def running(self) -> Generator[httpx.Client]:
        self.server.start()
        try:
            self.start_worker()
            with self.server.http() as http:
                yield http
        finally:
            if self._worker is not None:
                self.end_worker(signal.SIGTERM)
            if self.server.process is not None:
                self.server.end()


@pytest.fixture
def machines(tmp_path: Path, redis_url: str, object_store: SeaweedServer) -> Machines:
    return Machines(tmp_path, redis_url, object_store)


def check_downloads(http: httpx.Client, job_id: str) -> None:
    """Download every file of the final checkpoint, whole and from the middle, and compare it with the manifest."""
    manifest: dict[str, Any] = http.get(f"/v1/jobs/{job_id}/checkpoints/final").raise_for_status().json()
    for file in manifest["files"]:
        url = f"/v1/jobs/{job_id}/checkpoints/final/files/{file['path']}"
        content = http.get(url).raise_for_status().content
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
        rest = http.get(url, headers={"Range": "bytes=7-"})
        assert rest.status_code == 206
        assert rest.content == content[7:]
    archive = http.get(f"/v1/jobs/{job_id}/checkpoints/final/archive").raise_for_status()
    assert len(archive.content) == int(archive.headers["content-length"])


@pytest.mark.extended
def test_a_job_trains_and_is_deleted_without_a_common_folder(machines: Machines) -> None:
    data = as_jsonl(PYTHON_REFERENCE)
    with machines.running() as http:
        uploaded = (
            http.post("/v1/files", files={"file": ("data.jsonl", data)}, data={"purpose": "dataset"})
            .raise_for_status()
            .json()
        )
        assert http.get(f"/v1/files/{uploaded['id']}/content").content == data
        spec = tiny_job(dataset={"file": uploaded["id"]})
        job_id = http.post("/v1/jobs", json=spec).raise_for_status().json()["id"]
        job = wait_for_end(http, job_id)
        assert job["status"] == "succeeded", machines.logs()
        check_downloads(http, job_id)
        assert "=== attempt 1" in http.get(f"/v1/jobs/{job_id}/logs").text
        extra = f"files/{new_id('file')}"
        machines.object_store.client().put_object(Bucket=machines.bucket, Key=f"zeta/{extra}", Body=b"1")
        assert machines.differences() == [{"kind": "extra", "key": extra, "expected_bytes": None, "stored_bytes": 1}]
        machines.object_store.client().delete_object(Bucket=machines.bucket, Key=f"zeta/{extra}")
        http.delete(f"/v1/jobs/{job_id}").raise_for_status()
        http.delete(f"/v1/files/{uploaded['id']}").raise_for_status()
        wait_until(lambda: machines.stored_keys() == ["service.json"], 20, "all objects to be removed")
    assert not list((machines.server.home / "artifact-copies" / "incoming").iterdir())


@pytest.mark.slow
def test_nothing_is_lost_when_the_store_is_down_for_a_while(
    tmp_path: Path, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The store and the worker are killed while a job runs; the store comes back, and the worker resumes."""
    own_store = SeaweedServer(tmp_path_factory.mktemp("own-seaweedfs"))
    own_store.start()
    try:
        machines = Machines(tmp_path, redis_url, own_store)
        with machines.running() as http:
            spec = tiny_job(max_steps=400, checkpointing_steps=100)
            job_id = http.post("/v1/jobs", json=spec).raise_for_status().json()["id"]
            wait_until(
                lambda: any("step-100/manifest" in key for key in machines.stored_keys()), 90, "a stored checkpoint"
            )
            own_store.kill()
            machines.end_worker(signal.SIGKILL)
            machines.start_worker()
            own_store.start()
            assert wait_for_end(http, job_id)["status"] == "succeeded", machines.logs()
            check_downloads(http, job_id)
            more = tiny_job(max_steps=404, resume_from_checkpoint=job_id)
            second = http.post("/v1/jobs", json=more).raise_for_status().json()["id"]
            assert wait_for_end(http, second)["status"] == "succeeded", machines.logs()
            check_downloads(http, second)
    finally:
        own_store.stop()


@pytest.mark.extended
def test_training_continues_while_a_checkpoint_is_uploaded(
    tmp_path: Path, redis_url: str, object_store: SeaweedServer
) -> None:
    relay = TcpRelay(object_store.port, bytes_per_second=64 << 10)
    try:
        machines = Machines(tmp_path, redis_url, object_store, f"http://127.0.0.1:{relay.port}")
        with machines.running() as http:
            spec = tiny_job(max_steps=1_000_000, checkpointing_steps=20)
            job_id = http.post("/v1/jobs", json=spec).raise_for_status().json()["id"]
            key = f"zeta/jobs/{job_id}/checkpoints/step-20/manifest.json"
            wait_until(lambda: key.removeprefix("zeta/") in machines.stored_keys(), 90, "the checkpoint to be stored")
            stored_at = object_store.client().head_object(Bucket=machines.bucket, Key=key)["LastModified"]

            def later_steps() -> list[dict[str, Any]]:
                events = http.get(f"/v1/jobs/{job_id}/events", params={"limit": 1000}).json()["data"]
                return [event for event in events if event["type"] == "progress" and (event.get("step") or 0) > 20]

            later = wait_until(later_steps, 60, "the next steps to be reported")
            assert datetime.fromisoformat(later[0]["created_at"]) < stored_at, "the upload takes several seconds"
            http.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()
            assert wait_for_end(http, job_id)["status"] == "cancelled"
    finally:
        relay.close()


def test_a_server_with_wrong_credentials_names_the_setting(
    tmp_path: Path, redis_url: str, object_store: SeaweedServer
) -> None:
    variables = {**object_store.environment(), "ZETA_ARTIFACTS_URL": f"s3://{object_store.new_bucket()}"}
    variables["AWS_SECRET_ACCESS_KEY"] = "wrong"
    with (
        pytest.raises(AssertionError, match=r"(?s)ZETA_ARTIFACTS_URL is 's3://.*SignatureDoesNotMatch"),
        running_server(tmp_path, redis_url, None, **variables),
    ):
        pass
