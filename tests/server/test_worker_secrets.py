"""Workers with a secret of their own: adding, rotating and revoking it over HTTP, and what each secret allows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from tests.harness.children import start_child
from tests.harness.service import clean_environment
from tests.harness.simulated_worker import SimulatedWorker, progress
from tests.harness.waiting import wait_until
from tests.server.server_process import REPOSITORY, SECRET, ServerProcess, error_of, running_server, submit
from zeta_core.contract.wire.messages import JournalAck, SecretRejected
from zeta_core.contract.wire.signatures import WorkerKey, parse_individual_secret


@pytest.fixture
def server(tmp_path: Path, redis_url: str) -> Iterator[ServerProcess]:
    with running_server(tmp_path, redis_url) as process:
        yield process


def add(http: httpx.Client, name: str) -> WorkerKey:
    """Add a worker; returns its key."""
    response = http.post("/v1/workers", json={"name": name})
    assert response.status_code == 201, response.text
    return key_in(response)


def key_in(response: httpx.Response) -> WorkerKey:
    key = parse_individual_secret(response.json()["secret"])
    assert key is not None
    return key


def status_of(http: httpx.Client, name: str) -> str | None:
    listed = http.get("/v1/workers").json()["data"]
    return next((worker["status"] for worker in listed if worker["name"] == name), None)


def wait_until_ready(http: httpx.Client, worker: SimulatedWorker, *running: tuple[str, int]) -> None:
    def is_ready() -> bool:
        worker.send_heartbeat(*running)
        return status_of(http, worker.name) == "ready"

    wait_until(is_ready, 30, f"{worker.name} to be ready")


def wait_until_rejected(worker: SimulatedWorker) -> SecretRejected:
    def rejection() -> SecretRejected | None:
        worker.send_heartbeat()
        received = [message for message in worker.receive_all() if isinstance(message, SecretRejected)]
        return received[0] if received else None

    found = wait_until(rejection, 30, f"{worker.name} to be told that its secret is not valid")
    assert found is not None
    return found


def start_job(http: httpx.Client, worker: SimulatedWorker) -> str:
    """Submit a job, and claim it with the worker."""
    job_id = submit(http)["id"]

    def is_dispatched() -> bool:
        worker.send_heartbeat()
        return worker.num_dispatched() > 0

    wait_until(is_dispatched, 60, "the job to be dispatched")
    assert worker.claim(job_id).granted
    worker.send_heartbeat((job_id, 1))
    return job_id


@pytest.mark.extended
def test_an_added_worker_joins_and_only_with_its_own_secret(http: httpx.Client, client: redis.Redis) -> None:
    worker = SimulatedWorker(client, add(http, "gpu-7"), "gpu-7")
    wait_until_ready(http, worker)
    (listed,) = http.get("/v1/workers").json()["data"]
    assert listed["has_own_secret"] is True
    assert abs(listed["clock_ahead_seconds"]) < 30
    job_id = start_job(http, worker)
    assert worker.publish(job_id, 1, progress(1)).stored_line == 1
    shared = SimulatedWorker(client, SECRET, "gpu-7")
    shared.incarnation = "another-1"
    assert "has a secret of its own" in wait_until_rejected(shared).reason
    wait_until_ready(http, worker, (job_id, 1))
    assert http.get(f"/v1/jobs/{job_id}").json()["status"] == "running"


def test_a_secret_is_shown_once_and_not_stored(server: ServerProcess, http: httpx.Client) -> None:
    created = http.post("/v1/workers", json={"name": "gpu-7"}).json()
    secret = created.pop("secret")
    assert secret.startswith("zeta-worker:")
    assert http.get("/v1/workers/secrets").json()["data"] == [created]
    key = secret.rpartition(":")[2]
    stored = b"".join(file.read_bytes() for file in server.home.glob("zeta.db*")) + server.log().encode()
    assert key.encode() not in stored
    assert bytes.fromhex(key) not in stored
    again = http.post("/v1/workers", json={"name": "gpu-7"})
    assert (again.status_code, error_of(again)["code"]) == (409, "worker_exists")
    actions = [(entry["action"], entry["object_id"]) for entry in http.get("/v1/audit").json()["data"]]
    assert actions == [("worker.add", "gpu-7")]


@pytest.mark.extended
def test_a_rotated_secret_replaces_the_old_one_after_the_grace_period(http: httpx.Client, client: redis.Redis) -> None:
    first = add(http, "gpu-7")
    worker = SimulatedWorker(client, first, "gpu-7")
    wait_until_ready(http, worker)
    response = http.post("/v1/workers/gpu-7/rotate", json={"grace_seconds": 3600})
    second = key_in(response)
    assert response.json()["old_secret_expires_at"] is not None
    assert second.key != first.key
    wait_until_ready(http, worker)
    job_id = start_job(http, worker)  # the answers are signed with the old secret
    third = key_in(http.post("/v1/workers/gpu-7/rotate"))
    for key in (first, second):
        old = SimulatedWorker(client, key, "gpu-7")
        assert "was replaced" in wait_until_rejected(old).reason
    renewed = SimulatedWorker(client, third, "gpu-7")
    wait_until_ready(http, renewed, (job_id, 1))
    assert renewed.publish(job_id, 1, progress(1)).stored_line == 1


@pytest.mark.extended
def test_revoking_a_worker_moves_its_job_and_rejects_its_messages(http: httpx.Client, client: redis.Redis) -> None:
    worker = SimulatedWorker(client, add(http, "gpu-7"), "gpu-7")
    wait_until_ready(http, worker)
    job_id = start_job(http, worker)
    assert http.delete("/v1/workers/gpu-7").json() == {"id": "gpu-7", "object": "worker_secret", "deleted": True}
    ack = worker.receive(JournalAck, job_id)
    assert isinstance(ack, JournalAck)
    assert ack.fenced, "the worker must end the run"
    wait_until(lambda: http.get(f"/v1/jobs/{job_id}").json()["status"] == "queued", 30, "the job to be queued")
    assert http.get(f"/v1/jobs/{job_id}").json()["attempts"][0]["reason"] == "worker_lost"
    assert "was revoked" in wait_until_rejected(worker).reason
    assert status_of(http, "gpu-7") == "gone"
    worker.send(worker.batch(job_id, 1, progress(1)))
    other = SimulatedWorker(client, add(http, "gpu-8"), "gpu-8")

    def is_dispatched() -> bool:
        other.send_heartbeat()
        return other.num_dispatched() > 0

    wait_until(is_dispatched, 60, "the job to move to another worker")
    assert http.delete("/v1/workers/gpu-7").is_success, "revoking again has no effect"
    renewed = add(http, "gpu-7")
    assert renewed.secret_id != worker.key.secret_id
    assert 'zeta_rejected_messages_total{reason="sender"}' in http.get("/metrics").text


@pytest.mark.extended
def test_without_the_shared_secret_only_added_workers_join(tmp_path: Path, redis_url: str, client: redis.Redis) -> None:
    with running_server(tmp_path, redis_url, ZETA_SHARED_WORKER_SECRET="off") as server, server.http() as http:
        shared = SimulatedWorker(client, SECRET, "gpu-6")
        assert "ZETA_SHARED_WORKER_SECRET=off" in wait_until_rejected(shared).reason
        wait_until_ready(http, SimulatedWorker(client, add(http, "gpu-7"), "gpu-7"))


@pytest.mark.extended
@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "name"), ({"name": "-"}, "name"), ({"name": "a b"}, "name"), ({"name": "a", "secret": "s"}, "secret")],
)
def test_an_invalid_request_to_add_a_worker_names_the_field(
    http: httpx.Client, body: dict[str, Any], param: str
) -> None:
    response = http.post("/v1/workers", json=body)
    assert (response.status_code, error_of(response)["param"]) == (422, param)


@pytest.mark.extended
def test_only_workers_with_a_secret_of_their_own_are_rotated_and_revoked(http: httpx.Client) -> None:
    for response in (http.delete("/v1/workers/nobody"), http.post("/v1/workers/nobody/rotate")):
        assert (response.status_code, error_of(response)["code"]) == (404, "worker_not_found")
    add(http, "gpu-7")
    http.delete("/v1/workers/gpu-7")
    response = http.post("/v1/workers/gpu-7/rotate")
    assert (response.status_code, error_of(response)["code"]) == (409, "worker_revoked")


# --- Real worker processes --------------------------------------------------------------------------------------------


def start_worker(folder: Path, redis_url: str, secret: str, **variables: str) -> subprocess.Popen[bytes]:
    environment = {
        **clean_environment(),
        "PYTHONPATH": str(REPOSITORY),
        "ZETA_HOME": str(folder / "home"),
        "ZETA_REDIS_URL": redis_url,
        "ZETA_WORKER_SECRET": secret,
        "ZETA_WARM_START": "no",
        **variables,
    }
    (folder / "home").mkdir(exist_ok=True)
    return start_child([sys.executable, "-m", "worker"], log_file=folder / "worker.log", environment=environment)


@pytest.mark.extended
def test_a_real_worker_joins_under_the_name_in_its_secret_and_stops_when_revoked(
    http: httpx.Client, tmp_path: Path, redis_url: str
) -> None:
    secret = http.post("/v1/workers", json={"name": "gpu-7"}).json()["secret"]
    folder = tmp_path / "worker"
    folder.mkdir()
    worker = start_worker(folder, redis_url, secret)
    try:
        wait_until(lambda: status_of(http, "gpu-7") == "ready", 60, "the worker to be ready")
        assert http.delete("/v1/workers/gpu-7").is_success
        assert worker.wait(60) == 2
    finally:
        if worker.poll() is None:
            worker.kill()
            worker.wait()
    log = (folder / "worker.log").read_text()
    assert "The server rejects the secret of this worker: worker gpu-7 was revoked" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("secret", "name", "sentence"),
    [
        ("zeta-worker:abc:gpu-7", "", "ZETA_WORKER_SECRET is (hidden): it is incomplete"),
        (WorkerKey("gpu-7", "abc", bytes(32)).text, "gpu-8", "ZETA_WORKER_SECRET is the secret of worker 'gpu-7'"),
    ],
)
def test_a_worker_with_an_unusable_secret_exits_with_the_fix(
    tmp_path: Path, redis_url: str, secret: str, name: str, sentence: str
) -> None:
    worker = start_worker(tmp_path, redis_url, secret, ZETA_WORKER_NAME=name)
    assert worker.wait(60) == 2
    assert sentence in (tmp_path / "worker.log").read_text()
