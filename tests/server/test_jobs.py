"""Jobs over HTTP: submitting, listing, reading and cancelling; none is lost or created twice."""

import signal
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness.valkey import ValkeyServer
from tests.server.rows import Rows
from tests.server.server_process import SPEC, ServerProcess, error_of, running_server, submit
from zeta_core.contract.job.checkpoint import FileRole
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.status import JobStatus


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(
    request: pytest.FixtureRequest, shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server on each of the two databases; all tests of this file run on both."""
    home = tmp_path_factory.mktemp("server")
    if request.param == "sqlite":
        with running_server(home, shared_valkey.second_url) as process:
            yield process
        return
    with (
        request.getfixturevalue("postgres_server").fresh_database() as url,
        running_server(home, shared_valkey.second_url, url) as process,
    ):
        yield process


def test_a_new_job_has_a_queue_position_waiting_reason_and_defaults(http: httpx.Client) -> None:
    spec = {**SPEC, "entity_name": "first", "metadata": {"team": "a"}, "priority": 100}
    response = http.post("/v1/jobs", json=spec)
    job = response.json()
    assert response.status_code == 201
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    Job.model_validate(job)
    assert (job["object"], job["project"], job["status"], job["attempt"]) == ("job", "default", "queued", 0)
    assert (job["queue_position"], job["waiting_reason"]["code"]) == (1, "no_worker")
    assert job["spec"] == spec
    assert job["metadata"] == {"team": "a"}
    assert job["created_by"].startswith("key_")
    resolved = job["resolved_spec"]
    assert (resolved["learning_rate"], resolved["epochs"], resolved["max_steps"]) == (3e-4, None, 4)
    assert (resolved["global_batch_size"], resolved["batch_size"], resolved["seq_len"]) == (32, None, 64)
    assert http.get(f"/v1/jobs/{job['id']}").json() == job
    events = http.get(f"/v1/jobs/{job['id']}/events").json()
    assert [(event["seq"], event["type"], event["status"]) for event in events["data"]] == [(1, "status", "queued")]


def test_the_default_duration_is_one_epoch(http: httpx.Client) -> None:
    spec = {name: value for name, value in SPEC.items() if name != "max_steps"}
    assert http.post("/v1/jobs", json=spec).json()["resolved_spec"]["epochs"] == 1


def test_the_queue_is_ordered_by_priority_then_age(http: httpx.Client) -> None:
    for job in http.get("/v1/jobs?status=queued&limit=1000").json()["data"]:
        http.post(f"/v1/jobs/{job['id']}/cancel")
    low, first, second, high = (submit(http, priority=priority) for priority in (-1, 0, 0, 1))
    positions = {job["id"]: job["queue_position"] for job in http.get("/v1/jobs?status=queued").json()["data"]}
    assert [positions[job["id"]] for job in (high, first, second, low)] == [1, 2, 3, 4]
    http.post(f"/v1/jobs/{high['id']}/cancel")
    assert http.get(f"/v1/jobs/{low['id']}").json()["queue_position"] == 3
    assert http.get(f"/v1/jobs/{high['id']}").json()["queue_position"] is None


def test_lists_are_newest_first_and_continue_after_an_id(http: httpx.Client) -> None:
    made = [submit(http, entity_name="paged")["id"] for _ in range(5)]
    whole = http.get("/v1/jobs?entity_name=paged").json()
    assert whole["object"] == "list"
    assert [job["id"] for job in whole["data"]] == made[::-1]
    assert (whole["has_more"], whole["first_id"], whole["last_id"]) == (False, made[4], made[0])
    found: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = http.get("/v1/jobs", params={"entity_name": "paged", "limit": 2, **after}).json()
        found += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert found == made[::-1]
    end = http.get("/v1/jobs", params={"entity_name": "paged", "after": made[0]}).json()
    assert end == {
        "object": "list",
        "data": [],
        "has_more": False,
        "first_id": None,
        "last_id": None,
        "next_after": None,
    }


def test_lists_can_be_sorted_and_continue_after_a_place(http: httpx.Client) -> None:
    made = [submit(http, entity_name=name, metadata={"set": "s"})["id"] for name in ("b", "C", "a", "b")]
    expected = [made[2], made[3], made[0], made[1]]  # equal names newest first
    found: list[str] = []
    params: dict[str, Any] = {"metadata[set]": "s", "status": ["queued", "running"], "sort": "name", "limit": 3}
    while True:
        page = http.get("/v1/jobs", params=params).json()
        found += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        params["after"] = page["next_after"]
    assert found == expected
    assert page["next_after"] is None
    for order, ids in (("created", made), ("-created", made[::-1]), ("loss", made[::-1]), ("-eval_loss", made[::-1])):
        listed = http.get("/v1/jobs", params={"metadata[set]": "s", "sort": order}).json()
        assert [job["id"] for job in listed["data"]] == ids
    unknown = error_of(http.get("/v1/jobs?sort=perplexity"))
    assert unknown["param"] == "sort"
    assert "'-eval_loss'" in unknown["message"]
    for after in (made[0], f"{made[0]},1", "x"):
        response = http.get("/v1/jobs", params={"sort": "name", "after": after})
        assert response.status_code == 422
        assert "next_after" in error_of(response)["message"]


def test_filters_narrow_the_list(http: httpx.Client) -> None:
    one = submit(http, entity_name="f", metadata={"a": "1", "b c": "x"})["id"]
    two = submit(http, entity_name="f", metadata={"a": "2"})["id"]
    http.post(f"/v1/jobs/{two}/cancel")

    def ids(**params: Any) -> list[str]:
        response = http.get("/v1/jobs", params={"entity_name": "f", **params})
        assert response.status_code == 200, response.text
        return [job["id"] for job in response.json()["data"]]

    assert ids() == [two, one]
    assert ids(status="queued") == [one]
    assert ids(status=["queued", "cancelled"]) == [two, one]
    assert ids(**{"metadata[a]": "2"}) == [two]
    assert ids(**{"metadata[a]": "1", "metadata[b c]": "x"}) == [one]
    assert ids(**{"metadata[a]": "1", "status": "cancelled"}) == []
    assert ids(**{"metadata[missing]": "1"}) == []
    assert ids(**{"metadata[a']": "1"}) == []
    assert ids(**{"metadata[$.a]": "1"}) == []
    assert http.get("/v1/jobs", params={'metadata[a"]': "1"}).status_code == 422


def test_a_queued_job_is_cancelled_immediately_and_only_once(http: httpx.Client) -> None:
    job = submit(http)
    response = http.post(f"/v1/jobs/{job['id']}/cancel")
    assert response.status_code == 202
    cancelled = response.json()
    assert (cancelled["status"], cancelled["status_reason"]) == ("cancelled", "cancelled_by_user")
    assert cancelled["finished_at"] is not None
    assert cancelled["waiting_reason"] is None
    again = http.post(f"/v1/jobs/{job['id']}/cancel")
    assert (again.status_code, error_of(again)["type"]) == (409, "conflict_error")
    assert "cancelled" in again.json()["error"]["message"]


def test_cancelling_a_running_job_is_idempotent(server: ServerProcess, http: httpx.Client) -> None:
    rows = Rows(server.settings)
    job_id = rows.job()
    rows.attempt(job_id, progress=[{"phase": "training", "step": 1, "loss": 2.0}])
    for _ in range(2):
        response = http.post(f"/v1/jobs/{job_id}/cancel")
        assert (response.status_code, response.json()["requested_action"]) == (202, "cancel")
        assert response.json()["status"] == "running"
    assert len(http.get(f"/v1/jobs/{job_id}/events").json()["data"]) == 3


# --- References -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"dataset": {"file": "file_00000000000000000000"}}, "dataset.file", "file_not_found"),
        ({"dataset": [{"builtin": "python-docs"}, {"file": "../x"}]}, "dataset.1.file", "file_not_found"),
        ({"dataset": {"path": "../secret.txt"}}, "dataset.path", "path_outside_root"),
        ({"dataset": {"path": "/etc/passwd"}}, "dataset.path", "path_outside_root"),
        ({"dataset": {"path": "a/../../b"}}, "dataset.path", "path_outside_root"),
        ({"dataset": {"path": "~root/x"}}, "dataset.path", "path_outside_root"),
        ({"dataset": [{"builtin": "python-docs"}, {"path": "a.txt"}]}, "dataset.1.path", "no_data_root"),
        ({"eval_dataset": {"path": "a.txt"}}, "eval_dataset.path", "no_data_root"),
        ({"dataset": {"hub": "org/name"}}, "dataset.hub", "hub_not_allowed"),
        ({"model": "org/name"}, "model", "hub_not_allowed"),
        ({"tokenizer": "org/name"}, "tokenizer", "hub_not_allowed"),
        ({"model": {"file": "file_00000000000000000000"}}, "model.file", "file_not_found"),
        ({"tokenizer": {"file": "x"}}, "tokenizer.file", "file_not_found"),
        ({"model": {"job": "job_00000000000000000000"}}, "model.job", "job_not_found"),
        ({"resume_from_checkpoint": "job_00000000000000000000"}, "resume_from_checkpoint", "job_not_found"),
    ],
)
def test_references_of_a_spec_must_exist_and_be_allowed(
    http: httpx.Client, fields: dict[str, Any], param: str, code: str
) -> None:
    response = http.post("/v1/jobs", json={**SPEC, **fields})
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (422, param, code)


def test_a_job_can_resume_another_jobs_checkpoint(server: ServerProcess, http: httpx.Client) -> None:
    rows = Rows(server.settings)
    other = rows.job()
    assert http.post("/v1/jobs", json={**SPEC, "resume_from_checkpoint": other}).status_code == 422
    state: dict[str, tuple[FileRole, bytes]] = {"training_state/state.json": ("state", b"{}")}
    rows.checkpoint(other, "step-5", 5, {"model.safetensors": ("weights", b"w"), **state})
    for named in (other, f"{other}/step-5"):
        assert http.post("/v1/jobs", json={**SPEC, "resume_from_checkpoint": named}).status_code == 201
    assert http.post("/v1/jobs", json={**SPEC, "model": {"job": other, "checkpoint": "step-5"}}).status_code == 201
    for checkpoint in ("final", "step-6", "../x"):
        response = http.post("/v1/jobs", json={**SPEC, "model": {"job": other, "checkpoint": checkpoint}})
        assert (response.status_code, error_of(response)["param"]) == (422, "model.job")


def test_a_checkpoint_without_training_state_cannot_be_resumed(server: ServerProcess, http: httpx.Client) -> None:
    rows = Rows(server.settings)
    other = rows.job()
    rows.checkpoint(other, "step-5", 5, {"model.safetensors": ("weights", b"w")})
    response = http.post("/v1/jobs", json={**SPEC, "resume_from_checkpoint": f"{other}/step-5"})
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (422, "resume_from_checkpoint", "no_training_state")


def test_latest_is_resolved_once_when_a_job_is_submitted(server: ServerProcess, http: httpx.Client) -> None:
    rows = Rows(server.settings)
    other = rows.job()
    rows.checkpoint(other, "step-5", 5, {"model.safetensors": ("weights", b"w")})
    model = {"job": other, "checkpoint": "latest"}
    job = http.post("/v1/jobs", json={**SPEC, "model": model}).json()
    assert job["spec"]["model"] == model
    assert job["resolved_spec"]["model"] == {"job": other, "checkpoint": "step-5"}


def test_jobs_and_checkpoints_of_other_projects_are_hidden(server: ServerProcess, http: httpx.Client) -> None:
    rows = Rows(server.settings)
    foreign = rows.job(project="other")
    rows.checkpoint(foreign, "final", 5, {"model.safetensors": ("weights", b"w")})
    for path in ("", "/events", "/logs", "/metrics", "/checkpoints", "/checkpoints/final"):
        assert http.get(f"/v1/jobs/{foreign}{path}").status_code == 404
    assert http.post(f"/v1/jobs/{foreign}/cancel").status_code == 404
    assert http.post("/v1/jobs", json={**SPEC, "model": {"job": foreign}}).status_code == 422
    assert foreign not in [job["id"] for job in http.get("/v1/jobs?limit=1000").json()["data"]]


# --- Idempotency ------------------------------------------------------------------------------------------------------


def test_a_repeated_key_returns_the_same_job_for_the_same_body_only(http: httpx.Client) -> None:
    first = http.post("/v1/jobs", json=SPEC, headers={"Idempotency-Key": "one"})
    again = http.post("/v1/jobs", json=dict(reversed(SPEC.items())), headers={"Idempotency-Key": "one"})
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json()["id"] == first.json()["id"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    other = http.post("/v1/jobs", json={**SPEC, "max_steps": 5}, headers={"Idempotency-Key": "one"})
    assert (other.status_code, error_of(other)["code"]) == (422, "idempotency_key_reused")
    assert http.post("/v1/jobs", json=SPEC, headers={"Idempotency-Key": "two"}).json()["id"] != first.json()["id"]


def test_a_rejected_body_does_not_use_its_key(http: httpx.Client) -> None:
    headers = {"Idempotency-Key": "corrected"}
    assert http.post("/v1/jobs", json={**SPEC, "max_steps": 0}, headers=headers).status_code == 422
    assert http.post("/v1/jobs", json={**SPEC, "model": "org/name"}, headers=headers).status_code == 422
    response = http.post("/v1/jobs", json=SPEC, headers=headers)
    assert response.status_code == 201
    assert "idempotent-replayed" not in response.headers


@pytest.mark.parametrize("key", ["x" * 256, "", "a\tb"])
def test_an_invalid_idempotency_key_is_rejected(http: httpx.Client, key: str) -> None:
    response = http.post("/v1/jobs", json=SPEC, headers={"Idempotency-Key": key})
    assert (response.status_code, error_of(response)["param"]) == (422, "Idempotency-Key")


def test_an_idempotency_key_expires_after_a_day(server: ServerProcess, http: httpx.Client) -> None:
    headers = {"Idempotency-Key": "yesterday's"}
    first = http.post("/v1/jobs", json=SPEC, headers=headers).json()["id"]
    Rows(server.settings).age_submissions(hours=23.9)
    assert http.post("/v1/jobs", json=SPEC, headers=headers).json()["id"] == first
    Rows(server.settings).age_submissions(hours=0.2)
    assert http.post("/v1/jobs", json={**SPEC, "max_steps": 9}, headers=headers).json()["id"] != first


def test_concurrent_equal_submissions_create_one_job(http: httpx.Client) -> None:
    def post(_number: int) -> httpx.Response:
        return http.post("/v1/jobs", json={**SPEC, "entity_name": "race"}, headers={"Idempotency-Key": "race"})

    with ThreadPoolExecutor(16) as threads:
        responses = list(threads.map(post, range(32)))
    assert {response.status_code for response in responses} == {201}
    assert len({response.json()["id"] for response in responses}) == 1
    assert sum("idempotent-replayed" not in response.headers for response in responses) == 1
    assert len(http.get("/v1/jobs?entity_name=race").json()["data"]) == 1


def test_concurrent_submissions_and_cancels_leave_no_gaps_in_events(http: httpx.Client) -> None:
    def post(number: int) -> str:
        job = submit(http, entity_name="many")
        if number % 2:
            assert http.post(f"/v1/jobs/{job['id']}/cancel").status_code == 202
        return job["id"]

    with ThreadPoolExecutor(8) as threads:
        ids = list(threads.map(post, range(24)))
    assert len(http.get("/v1/jobs?entity_name=many&limit=100").json()["data"]) == len(set(ids)) == 24
    for number, job_id in enumerate(ids):
        seqs = [event["seq"] for event in http.get(f"/v1/jobs/{job_id}/events").json()["data"]]
        assert seqs == list(range(1, len(seqs) + 1))
        assert len(seqs) >= 1 + number % 2


# --- Nothing accepted is lost -----------------------------------------------------------------------------------------


@pytest.mark.extended
def test_an_accepted_job_survives_an_immediate_kill(tmp_path: Path, redis_url: str) -> None:
    with running_server(tmp_path / "home", redis_url) as server:
        for number in range(2):
            with server.http() as http:
                job = submit(http, entity_name=f"killed-{number}")
                server.end(signal.SIGKILL)
            server.start()
            with server.http() as http:
                found = http.get(f"/v1/jobs/{job['id']}").json()
                assert (found["status"], found["entity_name"]) == (JobStatus.QUEUED, f"killed-{number}")
                assert len(http.get("/v1/jobs").json()["data"]) == number + 1
        with sqlite3.connect(server.home / "zeta.db") as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
