"""A server and a worker that share no folder, only the bucket of a real S3 server."""

import hashlib
import os
import signal
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.bucket_machines import Machines
from tests.end_to_end.specs import PYTHON_REFERENCE, as_jsonl, tiny_job
from tests.harness.disks import SmallDisk, can_mount
from tests.harness.seaweedfs import SeaweedServer
from tests.harness.service import wait_for_end
from tests.harness.tcp_relay import TcpRelay
from tests.harness.waiting import wait_until
from tests.server.server_process import error_of, running_server
from zeta_core.contract.identifiers import new_id


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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inputs_arrive_although_store_worker_and_server_are_killed(
    tmp_path: Path, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each of them is killed while the worker fetches a dataset of four megabytes, which takes it half a minute."""
    own_store = SeaweedServer(tmp_path_factory.mktemp("own-seaweedfs"))
    own_store.start()
    relay = TcpRelay(own_store.port, bytes_per_second=128 << 10)
    try:
        machines = Machines(tmp_path, redis_url, own_store, f"http://127.0.0.1:{relay.port}")

        def wait_for_more() -> None:
            before = relay.num_received_bytes
            wait_until(lambda: relay.num_received_bytes > before + 100_000, 60, "more of the dataset to be fetched")

        with machines.running() as http:
            files = {"file": ("data.jsonl", as_jsonl("\n\n".join([PYTHON_REFERENCE] * 8)))}
            uploaded = http.post("/v1/files", files=files, data={"purpose": "dataset"}).raise_for_status().json()
            assert uploaded["bytes"] > 4_000_000
            spec = tiny_job(dataset={"file": uploaded["id"]})
            job_id = http.post("/v1/jobs", json=spec).raise_for_status().json()["id"]
            wait_for_more()
            own_store.kill()
            own_store.start()
            wait_for_more()
            machines.server.end(signal.SIGKILL)
            machines.server.start()
            wait_for_more()
            machines.end_worker(signal.SIGKILL)
            machines.start_worker()
            wait_for_more()
            job = wait_for_end(http, job_id)
            assert job["status"] == "succeeded", machines.logs()
            assert [attempt["reason"] for attempt in job["attempts"]] == ["worker_lost", "completed"]
            check_downloads(http, job_id)
    finally:
        relay.close()
        own_store.stop()


@pytest.mark.slow
def test_a_full_bucket_delays_checkpoints_and_rejects_uploads_until_it_has_space(
    tmp_path: Path, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """SeaweedFS does not report a full disk; it answers with an internal error for each object that does not fit."""
    if not can_mount():
        pytest.skip("a small disk can't be mounted here")
    own_store = SeaweedServer(tmp_path_factory.mktemp("own-seaweedfs"))
    disk = SmallDisk(own_store.directory / "data", 200)
    try:
        own_store.start()
        machines = Machines(tmp_path, redis_url, own_store)
        with machines.running() as http:
            job_id = http.post("/v1/jobs", json=tiny_job()).raise_for_status().json()["id"]
            disk.fill(leave_bytes=64 << 10)  # enough for the names of objects, and not for weights
            wait_until(
                lambda: f"A checkpoint of {job_id} cannot be stored" in machines.worker_log.read_text(),
                120,
                "the worker to find the bucket full",
            )
            digits = os.urandom(1 << 20).hex()  # SeaweedFS compresses texts
            files, form = {"file": ("a.txt", digits)}, {"purpose": "dataset"}
            rejected = http.post("/v1/files", files=files, data=form)
            assert (rejected.status_code, error_of(rejected)["code"]) == (503, "storage_unavailable")
            assert http.get(f"/v1/jobs/{job_id}").json()["status"] == "running"
            disk.free()
            job = wait_for_end(http, job_id)
            assert job["status"] == "succeeded", machines.logs()
            assert len(job["attempts"]) == 1
            check_downloads(http, job_id)
            http.post("/v1/files", files=files, data=form).raise_for_status()
            assert machines.differences() == []
    finally:
        own_store.stop()
        disk.close()


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
