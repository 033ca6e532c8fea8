"""The limits of a project: where each is applied, what it says, and that no other project notices."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.engine.redis_client import connect
from server.engine.shared_counts import SharedCounts
from server.http.request_rates import RequestRates
from tests.harness.waiting import wait_until
from tests.server.rows import Rows
from tests.server.server_process import SPEC, ServerProcess, error_of, running_server, submit
from zeta_core.contract.access import NO_LIMITS
from zeta_core.contract.errors import QuotaExceeded

UNSET = NO_LIMITS.model_dump()


@pytest.fixture
def project(request: pytest.FixtureRequest) -> str:
    """A project of the test's own."""
    return str(request.node.name).replace("_", "-")[:60].strip("-")


@pytest.fixture
def member(server: ServerProcess, http: httpx.Client, project: str) -> Iterator[httpx.Client]:
    """A client with a key of the project that may submit."""
    created = http.post("/v1/keys", json={"name": "n", "project": project, "scopes": ["submit"]}).json()
    with server.http(created["key"]) as client:
        yield client


def limit(http: httpx.Client, project: str, **limits: int | None) -> dict[str, Any]:
    response = http.patch(f"/v1/projects/{project}", json={"limits": limits})
    assert response.status_code == 200, response.text
    return response.json()


def upload(http: httpx.Client, num_bytes: int) -> httpx.Response:
    return http.post("/v1/files", files={"file": ("a.txt", b"x" * num_bytes)}, data={"purpose": "dataset"})


def test_limits_are_set_restored_and_shown_with_the_usage(
    http: httpx.Client, member: httpx.Client, project: str
) -> None:
    before = http.get(f"/v1/projects/{project}").json()
    assert before["limits"] == UNSET
    assert before["usage"] == {"queued_jobs": 0, "running_jobs": 0, "gpus": 0, "stored_bytes": 0}
    limit(http, project, max_queued_jobs=5, max_priority=-3)
    limit(http, project, max_gpus=0)
    changed = limit(http, project, max_priority=None)
    assert changed["limits"] == {**UNSET, "max_queued_jobs": 5, "max_gpus": 0}
    assert changed["effective_limits"] == {**before["effective_limits"], "max_queued_jobs": 5, "max_gpus": 0}
    submit(member)
    assert upload(member, 1000).status_code == 201
    own = member.get(f"/v1/projects/{project}").json()
    assert own["usage"] == {"queued_jobs": 1, "running_jobs": 0, "gpus": 0, "stored_bytes": 1000}
    assert member.patch(f"/v1/projects/{project}", json={"limits": {}}).status_code == 403
    (entry, *_) = http.get("/v1/audit", params={"project": project, "action": "project.change"}).json()["data"]
    assert entry["details"] == {"max_priority": None}


@pytest.mark.parametrize(
    ("limits", "param"),
    [
        ({"max_queued_jobs": -1}, "limits.max_queued_jobs"),
        ({"max_gpus": "2"}, "limits.max_gpus"),
        ({"max_gpus": 1.5}, "limits.max_gpus"),
        ({"max_priority": 101}, "limits.max_priority"),
        ({"max_upload_bytes": 1 << 50}, "limits.max_upload_bytes"),
        ({"max_job": 1}, "limits.max_job"),
    ],
)
def test_an_invalid_limit_is_refused(http: httpx.Client, limits: dict[str, Any], param: str) -> None:
    for method, path, body in (("PATCH", "/v1/projects/default", {}), ("POST", "/v1/projects", {"name": "never"})):
        response = http.request(method, path, json={**body, "limits": limits})
        assert (response.status_code, error_of(response)["param"]) == (422, param)
    assert http.get("/v1/projects/never").status_code == 404


def test_queued_jobs_are_limited_except_for_repeated_requests(
    http: httpx.Client, member: httpx.Client, project: str
) -> None:
    limit(http, project, max_queued_jobs=3)
    first = member.post("/v1/jobs", json=SPEC, headers={"Idempotency-Key": "first"}).json()
    submit(member)
    submit(member)
    refused = member.post("/v1/jobs", json=SPEC)
    assert (refused.status_code, error_of(refused)["code"]) == (429, "quota_exceeded")
    assert "has 3 queued jobs, and its limit is 3 (max_queued_jobs" in error_of(refused)["message"]
    again = member.post("/v1/jobs", json=SPEC, headers={"Idempotency-Key": "first"})
    assert (again.status_code, again.json()["id"]) == (201, first["id"])
    assert member.post(f"/v1/jobs/{first['id']}/rerun").status_code == 429
    submit(http)  # another project
    member.post(f"/v1/jobs/{first['id']}/cancel").raise_for_status()
    submit(member)


def test_a_sweep_above_the_limit_of_queued_jobs_creates_no_job(
    http: httpx.Client, member: httpx.Client, project: str
) -> None:
    limit(http, project, max_queued_jobs=3)
    sweep = {"spec": SPEC, "grid": {"learning_rate": [1e-3, 1e-4], "seed": [1, 2]}}
    response = member.post("/v1/sweeps", json=sweep)
    assert (response.status_code, error_of(response)["code"]) == (429, "quota_exceeded")
    assert member.get("/v1/jobs").json()["data"] == []
    limit(http, project, max_queued_jobs=4)
    assert member.post("/v1/sweeps", json=sweep).status_code == 201


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_concurrent_submissions_respect_the_limit_of_queued_jobs(
    kind: str, tmp_path: Path, redis_url: str, request: pytest.FixtureRequest
) -> None:
    url = str(request.getfixturevalue("postgres_url")) if kind == "postgresql" else None
    with (
        running_server(tmp_path / "home", redis_url, url, ZETA_PROJECT_MAX_QUEUED="5") as server,
        server.http() as http,
        ThreadPoolExecutor(16) as threads,
    ):
        posts = [threads.submit(http.post, "/v1/jobs", json=SPEC) for _ in range(40)]
        statuses = Counter(post.result().status_code for post in posts)
        assert statuses == {201: 5, 429: 35}
        assert http.get("/v1/projects/default").json()["usage"]["queued_jobs"] == 5


def test_priorities_and_gpus_of_a_spec_are_limited(http: httpx.Client, member: httpx.Client, project: str) -> None:
    limit(http, project, max_priority=2, max_gpus=1)
    submit(member, priority=2, resources={"gpus": 1})
    for path in ("/v1/jobs", "/v1/jobs/validate"):
        response = member.post(path, json={**SPEC, "priority": 3, "resources": {"gpus": 2}})
        assert response.status_code == 422
        details = {detail["param"]: detail["message"] for detail in error_of(response)["details"]}
        assert details["priority"] == "priority is 3; this project may use at most 2 (max_priority)."
        assert details["resources.gpus"] == "resources.gpus is 2, above the limit of this project (max_gpus: 1)."


def test_files_and_checkpoints_count_against_stored_bytes(
    http: httpx.Client, member: httpx.Client, rows: Rows, project: str
) -> None:
    limit(http, project, max_stored_bytes=5000, max_upload_bytes=3000)
    assert upload(member, 3001).status_code == 413
    assert upload(member, 2000).status_code == 201
    job = submit(member)["id"]
    rows.checkpoint(job, "step-1", 1, {"model.safetensors": ("weights", b"w" * 2500)}, num_bytes=2500)
    response = upload(member, 600)
    assert (response.status_code, error_of(response)["code"]) == (429, "quota_exceeded")
    assert "4500 of 5000 bytes (max_stored_bytes" in error_of(response)["message"]
    assert upload(member, 500).status_code == 201
    wait_until(lambda: member.post("/v1/jobs", json=SPEC).status_code == 429, 5, "the stored bytes to be counted")
    assert "stores 5000 bytes, and its limit is 5000" in error_of(member.post("/v1/jobs", json=SPEC))["message"]
    assert http.get(f"/v1/projects/{project}").json()["usage"]["stored_bytes"] == 5000
    assert upload(http, 3001).status_code == 201  # another project


def test_too_many_requests_are_refused_with_the_time_to_wait(
    http: httpx.Client, member: httpx.Client, project: str
) -> None:
    limit(http, project, max_requests_per_minute=5)
    statuses = [member.get("/v1/jobs").status_code for _ in range(7)]
    assert statuses == [200] * 5 + [429] * 2
    response = member.get("/v1/jobs")
    assert error_of(response)["code"] == "rate_limited"
    assert 1 <= int(response.headers["retry-after"]) <= 12
    assert http.get("/v1/jobs", headers={"Zeta-Project": project}).status_code == 200  # an admin key is not limited
    limit(http, project, max_requests_per_minute=None)
    assert member.get("/v1/jobs").status_code == 200


def test_a_rate_allows_a_burst_and_then_its_mean(redis_url: str) -> None:
    async def measure() -> None:
        now = 0.0
        redis = connect(redis_url)
        rates = RequestRates(SharedCounts(redis), lambda: now)
        for _ in range(60):
            await rates.count("p", 60)
        with pytest.raises(QuotaExceeded) as refused:
            await rates.count("p", 60)
        assert refused.value.retry_after_seconds == 1
        await rates.count("another", 60)
        now = 61.0
        await rates.count("p", 60)
        with pytest.raises(QuotaExceeded):
            await rates.count("p", 60)
        await redis.aclose()

    asyncio.run(measure())


def test_servers_count_the_requests_of_a_project_together(redis_url: str) -> None:
    async def measure() -> tuple[int, int | None]:
        now, num_allowed = 30.0, 0
        connections = [connect(redis_url) for _ in range(2)]
        servers = [RequestRates(SharedCounts(redis), lambda: now) for redis in connections]
        wait: int | None = None
        for number in range(40):
            try:
                await servers[number % 2].count("p", 20)
                num_allowed += 1
            except QuotaExceeded as refused:
                wait = refused.retry_after_seconds
        for redis in connections:
            await redis.aclose()
        return num_allowed, wait

    num_allowed, wait = asyncio.run(measure())
    assert num_allowed == 20
    assert wait is not None
    assert 30 <= wait <= 36, "three seconds after the next minute has begun, one request is possible"


def test_without_redis_each_server_limits_its_own_requests(tmp_path: Path) -> None:
    async def measure() -> int:
        redis = connect(f"unix://{tmp_path}/nobody-listens-here")
        rates, num_allowed = RequestRates(SharedCounts(redis), lambda: 0.0), 0
        with suppress(QuotaExceeded):
            for _ in range(40):
                await rates.count("p", 20)
                num_allowed += 1
        await redis.aclose()
        return num_allowed

    assert asyncio.run(measure()) == 20


def test_pages_of_the_dashboard_count_as_requests(server: ServerProcess, http: httpx.Client, project: str) -> None:
    key = http.post("/v1/keys", json={"name": "n", "project": project, "scopes": ["submit"]}).json()["key"]
    limit(http, project, max_requests_per_minute=4)
    with httpx.Client(base_url=server.url, timeout=30) as browser:
        assert browser.post("/login", data={"key": key}).status_code == 303
        responses = [browser.get("/") for _ in range(6)]
    assert [response.status_code for response in responses] == [200] * 4 + [429] * 2
    assert "max_requests_per_minute" in responses[-1].text
    assert int(responses[-1].headers["retry-after"]) > 0


@pytest.mark.extended
def test_the_settings_are_the_default_limits(tmp_path: Path, redis_url: str) -> None:
    settings = {"ZETA_PROJECT_MAX_QUEUED": "1", "ZETA_PROJECT_MAX_PRIORITY": "0", "ZETA_PROJECT_MAX_GPUS": "4"}
    with running_server(tmp_path / "home", redis_url, **settings) as server, server.http() as http:
        limits = http.get("/v1/projects/default").json()
        assert limits["limits"] == {**UNSET, "hub": "operator-token"}
        effective = {name: value for name, value in limits["effective_limits"].items() if value is not None}
        expected = {"max_queued_jobs": 1, "max_priority": 0, "max_gpus": 4}
        expected |= {"max_upload_bytes": 16 << 30, "max_streams": 1000, "hub": "operator-token"}
        assert effective == expected
        submit(http)
        assert http.post("/v1/jobs", json=SPEC).status_code == 429
        assert http.post("/v1/jobs", json={**SPEC, "priority": 1}).status_code == 422
