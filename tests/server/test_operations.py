"""For operators: health, metrics, workers, OpenAPI, keys, and the start and end of the process."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from psycopg import sql

from migrations.upgrade import upgrade
from server.settings import ServerSettings
from tests.harness.ports import free_loopback_port
from tests.harness.postgres import PostgresServer
from tests.harness.service import clean_environment
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.rows import Rows
from tests.server.server_process import API_KEY, REPOSITORY, SECRET, ServerProcess, error_of, running_server, submit
from zeta_core.contract.errors import InvalidSettings
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.responses import DeviceReport, Worker
from zeta_core.contract.job.status import JobStatus, StatusReason, WaitingCode
from zeta_core.contract.wire.messages import WORKERS_HASH, Heartbeat
from zeta_core.contract.wire.signatures import derive_key, sign_heartbeat


def run_server(**variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m server`` with invalid settings until it exits."""
    environment = {**clean_environment(), "PYTHONPATH": str(REPOSITORY), **variables}
    command = [sys.executable, "-m", "server"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


# --- Health and metrics -----------------------------------------------------------------------------------------------


@pytest.mark.extended
def test_a_server_without_redis_is_ready_but_degraded(tmp_path: Path) -> None:
    valkey = ValkeyServer(tmp_path / "valkey")
    with running_server(tmp_path / "home", valkey.url) as server, server.http() as http:
        assert http.get("/healthz").json()["status"] == "ok"
        response = http.get("/readyz")
        assert (response.status_code, response.json()["status"]) == (200, "degraded")
        assert submit(http)["status"] == "queued"  # and accepts jobs
        valkey.start()
        try:
            wait_until(lambda: http.get("/readyz").json()["status"] == "ok", 20, "the server to have found Redis")
        finally:
            valkey.stop()


@pytest.mark.extended
def test_a_server_without_its_database_is_live_but_not_ready(
    tmp_path: Path, redis_url: str, postgres_server: PostgresServer
) -> None:
    with (
        postgres_server.fresh_database() as url,
        running_server(tmp_path / "home", redis_url, url) as server,
        server.http() as http,
        psycopg.connect(postgres_server.url("postgres"), autocommit=True) as admin,
    ):
        assert http.get("/readyz").status_code == 200
        name = url.rpartition("/")[2]
        admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(sql.Identifier(name)))
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        for path in ("/readyz", "/v1/jobs"):
            response = http.get(path)
            assert (response.status_code, error_of(response)["type"]) == (503, "unavailable_error")
            assert name not in response.text
        assert http.get("/healthz").status_code == 200
        admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(sql.Identifier(name)))
        wait_until(lambda: http.get("/readyz").status_code == 200, 20, "the server to be ready again")
        assert http.get("/v1/jobs").status_code == 200


def read_metrics(http: httpx.Client) -> dict[tuple[str, tuple[str, ...]], float]:
    text = http.get("/metrics").text
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_jobs_ends_and_waits_without_job_ids(rows: Rows, http: httpx.Client) -> None:
    before = read_metrics(http)
    assert before["zeta_jobs", ("queued",)] == 0
    queued, done = submit(http)["id"], rows.job()
    rows.attempt(done, to=JobStatus.SUCCEEDED)
    cancelled = submit(http)["id"]
    http.post(f"/v1/jobs/{cancelled}/cancel")
    after = read_metrics(http)
    assert [after["zeta_jobs", (status,)] for status in ("queued", "running", "succeeded", "cancelled")] == [1, 0, 1, 1]
    assert after["zeta_job_ends_total", ("completed",)] == 1
    assert after["zeta_job_ends_total", ("cancelled_by_user",)] == 1
    assert after["zeta_http_requests_total", ("POST", "/v1/jobs", "201")] == 2
    assert http.delete(f"/v1/jobs/{done}").status_code == 200
    deleted = read_metrics(http)
    assert deleted["zeta_jobs", ("succeeded",)] == 0
    assert deleted["zeta_job_ends_total", ("completed",)] == 1  # a counter never decreases
    text = http.get("/metrics").text
    assert "zeta_queue_wait_seconds_bucket" in text
    assert not any(job_id in text for job_id in (queued, done, cancelled))


# --- Workers ----------------------------------------------------------------------------------------------------------


def test_a_worker_is_listed_with_its_slots_and_running_jobs(http: httpx.Client, shared_valkey: ValkeyServer) -> None:
    job_id = submit(http)["id"]
    slots = [
        DeviceReport(slot=0, kind="cuda", name="H200", memory_bytes=1 << 37, job_id=job_id, attempt=1),
        DeviceReport(slot=1, kind="cuda", name="H200", memory_bytes=1 << 37),
    ]
    with shared_valkey.client(shared_valkey.second_url) as redis:
        for number, (name, secret) in enumerate((("w-1", SECRET), ("w-2", SECRET), ("forged", "another secret"))):
            beat = Heartbeat(
                worker=name,
                incarnation="i",
                beat=1,
                version="1",
                host="h",
                started_at=utc_now() - timedelta(hours=1),
                cores=8,
                memory_bytes=1 << 38,
                labels={"zone": "a"},
                stopping=number == 1,
                data_root=number == 0,
                slots=slots,
            )
            redis.hset(WORKERS_HASH, name, sign_heartbeat(beat, derive_key(secret, name), channel=WORKERS_HASH))
        try:
            wait_until(lambda: len(http.get("/v1/workers").json()["data"]) == 2, 20, "both workers")
        finally:
            redis.delete(WORKERS_HASH)
    first, second = [Worker.model_validate(entry) for entry in http.get("/v1/workers").json()["data"]]
    assert (first.name, first.host, first.cores, first.labels) == ("w-1", "h", 8, {"zone": "a"})
    assert [(slot.kind, slot.job_id, slot.attempt) for slot in first.slots] == [
        ("cuda", job_id, 1),
        ("cuda", None, None),
    ]
    assert first.status in ("ready", "gone")  # there was only one heartbeat
    assert second.status in ("stopping", "gone")
    submit(http, dataset={"path": "corpus/*.txt"})  # a worker reports a data root
    page = http.get("/v1/workers?limit=1").json()
    assert (page["has_more"], page["last_id"]) == (True, "w-1")
    assert [entry["name"] for entry in http.get("/v1/workers?after=w-1").json()["data"]] == ["w-2"]


# --- OpenAPI ----------------------------------------------------------------------------------------------------------


def test_openapi_describes_models_and_enumerations(http: httpx.Client) -> None:
    description = http.get("/openapi.json").json()
    schemas = description["components"]["schemas"]
    assert schemas["JobStatus"]["enum"] == [status.value for status in JobStatus]
    assert schemas["StatusReason"]["enum"] == [reason.value for reason in StatusReason]
    assert schemas["WaitingCode"]["enum"] == [code.value for code in WaitingCode]
    body = description["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/JobSpec"}
    assert schemas["JobSpec"]["additionalProperties"] is False
    assert {"model", "dataset"} <= set(schemas["JobSpec"]["required"])
    assert {"Job", "ErrorBody", "Event", "ProgressLine", "Manifest", "StoredFile", "Worker"} <= set(schemas)
    for path, operations in description["paths"].items():
        error_body = "OpenAIErrorBody" if path.startswith("/openai/") else "ErrorBody"
        for operation in operations.values():
            error = operation["responses"]["default"]["content"]["application/json"]["schema"]
            assert error == {"$ref": f"#/components/schemas/{error_body}"}


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_openapi_has_no_dangling_references(http: httpx.Client) -> None:
    description = http.get("/openapi.json").json()
    found = set(references(description))
    assert found
    schemas = description["components"]["schemas"]
    assert [reference for reference in found if reference.removeprefix("#/components/schemas/") not in schemas] == []


# --- Keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.extended
def test_a_new_admin_key_replaces_the_old_one_and_only_hashes_are_stored(tmp_path: Path, redis_url: str) -> None:
    with running_server(tmp_path / "home", redis_url) as server:
        server.end()
    with running_server(tmp_path / "home", redis_url, ZETA_API_KEY="a-second-key") as server:
        for key, status in ((API_KEY, 401), ("a-second-key", 200)):
            with server.http(key) as http:
                assert http.get("/v1/jobs").status_code == status
        stored = b"".join(file.read_bytes() for file in server.home.glob("zeta.db*"))
        assert API_KEY.encode() not in stored
        assert b"a-second-key" not in stored
        assert "a-second-key" not in server.log()


def test_a_key_works_until_it_expires_or_is_revoked(server: ServerProcess, rows: Rows) -> None:
    rows.key("valid", expires_at=utc_now() + timedelta(hours=1))
    rows.key("expired", expires_at=utc_now())
    rows.key("revoked", revoked_at=utc_now())
    for key, status, code in (
        ("valid", 200, None),
        ("expired", 401, "expired_api_key"),
        ("revoked", 401, "invalid_api_key"),
    ):
        with server.http(key) as http:
            response = http.get("/v1/jobs")
        assert (response.status_code, response.json().get("error", {}).get("code")) == (status, code)


# --- Start and end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"ZETA_API_KEY": "k"}, "ZETA_WORKER_SECRET"),
        ({"ZETA_WORKER_SECRET": "zeta-worker:a:w:0"}, "(hidden): it is the secret of a single worker"),
        ({"ZETA_WORKER_SECRET": "s", "ZETA_PORT": "none"}, "ZETA_PORT is 'none'"),
        ({"ZETA_WORKER_SECRET": "s", "ZETA_HUB": "maybe;"}, "ZETA_HUB is 'maybe;'"),
        ({"ZETA_WORKER_SECRET": "s", "ZETA_MAX_UPLOAD_BYTES": "0"}, "ZETA_MAX_UPLOAD_BYTES is '0'"),
        ({"ZETA_WORKER_SECRET": "s", "ZETA_ARTIFACTS_URL": "s3://Bucket"}, "the bucket's name must have"),
        ({"ZETA_WORKER_SECRET": "s", "ZETA_ARTIFACTS_URL": "relative/path"}, "ZETA_ARTIFACTS_URL"),
    ],
)
def test_an_invalid_setting_is_reported_with_its_value(variables: dict[str, str], sentence: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        ServerSettings.from_environment(variables)
    assert sentence in caught.value.message


def test_the_hub_is_off_unless_enabled_for_all_or_for_owners() -> None:
    def settings(hub: str) -> ServerSettings:
        return ServerSettings.from_environment({"ZETA_WORKER_SECRET": "s", "ZETA_HUB": hub})

    assert not settings("").hub_allows("org/name")
    assert settings("on").hub_allows("org/name")
    assert settings("org, other").hub_allows("other/name@main")
    assert not settings("org,other").hub_allows("organisation/name")


@pytest.mark.extended
def test_a_server_that_cannot_start_prints_one_sentence_and_exits_with_2(tmp_path: Path) -> None:
    settings = {"ZETA_HOME": str(tmp_path), "ZETA_WORKER_SECRET": "s", "ZETA_PORT": str(free_loopback_port())}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = {"ZETA_PORT": str(taken.getsockname()[1])}
        refused = [(run_server(**{**settings, **port}), "ZETA_PORT"), (run_server(**settings), "run `zeta migrate`")]
    upgrade(f"sqlite:///{tmp_path / 'zeta.db'}")
    refused += [(run_server(**settings), "ZETA_API_KEY")]
    for done, sentence in refused:
        assert (done.returncode, sentence in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr


@pytest.mark.extended
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_either_signal_ends_the_server_with_exit_code_0(tmp_path: Path, redis_url: str, how: signal.Signals) -> None:
    with running_server(tmp_path / "home", redis_url) as server:
        with socket.create_connection(("127.0.0.1", server.port)):
            process = server.process
            assert process is not None
            os.kill(process.pid, how)
            assert process.wait(10) == 0
        server.process = None


@pytest.mark.extended
def test_the_migrations_command_creates_the_servers_schema(tmp_path: Path) -> None:
    environment = {**clean_environment(), "PYTHONPATH": str(REPOSITORY), "ZETA_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "migrations"]
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "home" / "zeta.db").exists()
    refused = {**environment, "ZETA_DATABASE_URL": "postgresql://nobody@127.0.0.1:9/zeta"}
    done = subprocess.run(command, env=refused, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "cannot be opened" in done.stderr, "Traceback" in done.stderr) == (2, True, False)


def test_failures_of_a_connected_worker_are_visible(http: httpx.Client, shared_valkey: ValkeyServer) -> None:
    reason = "failing since 2026-01-01T00:00:00+00:00: connection refused"
    with shared_valkey.client(shared_valkey.second_url) as redis:

        def beat(number: int, **fields: Any) -> None:
            beat = Heartbeat(
                worker="w-failing",
                incarnation="i",
                beat=number,
                version="1",
                host="h",
                started_at=utc_now(),
                cores=8,
                memory_bytes=1 << 38,
                slots=[],
                **fields,
            )
            redis.hset(
                WORKERS_HASH, "w-failing", sign_heartbeat(beat, derive_key(SECRET, "w-failing"), channel=WORKERS_HASH)
            )

        def ready_after(number: int, **fields: Any) -> dict[str, Any]:
            beat(number, **fields)
            return http.get("/readyz").json()

        beats = iter(range(1, 1000))
        try:
            wait_until(
                lambda: "worker w-failing" in ready_after(next(beats), failing={"link-send": reason})["parts"],
                20,
                "the failure to be reported",
            )
            ready = ready_after(next(beats), failing={"link-send": reason})
            assert (ready["status"], ready["parts"]["worker w-failing"]) == ("degraded", f"link-send: {reason}")
            wait_until(
                lambda: "worker w-failing" not in ready_after(next(beats), num_dropped=7)["parts"],
                20,
                "the recovery to be reported",
            )
            (worker,) = [entry for entry in http.get("/v1/workers").json()["data"] if entry["name"] == "w-failing"]
            assert (worker["failing"], worker["num_dropped"]) == ({}, 7)
            assert 'zeta_dropped_messages_total{place="worker w-failing"} 7.0' in http.get("/metrics").text
        finally:
            redis.delete(WORKERS_HASH)
