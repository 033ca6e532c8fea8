"""Every route requires a scope, and two projects can't reach each other; both are generated from ``/openapi.json``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from server.routes.scopes import OPEN, SCOPES
from tests.harness.waiting import wait_until
from tests.server.rows import Rows
from tests.server.server_process import SPEC, ServerProcess, error_of, submit
from zeta_core.contract.access import Scope, allows
from zeta_core.contract.job.status import JobStatus

SECRET_TEXT = "canary-of-project-a"
FILE = {"files": {"file": (f"{SECRET_TEXT}.txt", SECRET_TEXT.encode())}, "data": {"purpose": "dataset"}}
SWEEP = {"spec": SPEC, "grid": {"seed": [1, 2]}}
# Valid bodies, so that a request fails only because of its key or the object.
BODIES: Mapping[str, Mapping[str, Any]] = {
    "POST /v1/jobs": {"json": SPEC},
    "POST /v1/jobs/validate": {"json": SPEC},
    "POST /v1/sweeps": {"json": SWEEP},
    "POST /v1/jobs/{job_id}/exports": {"json": {"to": "merged"}},
    "POST /v1/files": FILE,
    "POST /v1/keys": {"json": {"name": "n", "scopes": ["read"]}},
    "POST /v1/jobs/{job_id}/evaluations": {"json": {"file": "file_000000000000000000000000"}},
    "POST /v1/projects": {"json": {"name": "another"}},
    "POST /v1/webhooks": {"json": {"url": "https://example.org/hook"}},
    "POST /openai/v1/webhook_endpoints": {
        "json": {"url": "https://example.org/hook", "name": "n", "event_types": ["batch.failed"]}
    },
    "POST /openai/v1/webhook_endpoints/{webhook_endpoint_id}": {"json": {"name": "n"}},
    "POST /openai/v1/webhook_endpoints/{webhook_endpoint_id}/test": {"json": {"event_type": "batch.failed"}},
    "POST /openai/v1/files": {"files": FILE["files"], "data": {"purpose": "fine-tune"}},
    "POST /openai/v1/uploads": {"json": {"bytes": 1, "filename": "a.txt", "mime_type": "", "purpose": "fine-tune"}},
    "POST /openai/v1/uploads/{upload_id}/parts": {"files": {"data": ("a", b"a")}},
    "POST /openai/v1/uploads/{upload_id}/complete": {"json": {"part_ids": ["part"]}},
    "POST /openai/v1/fine_tuning/jobs": {"json": {"model": "m", "training_file": "f"}},
    "POST /openai/v1/fine_tuning/alpha/graders/run": {},
    "POST /openai/v1/fine_tuning/alpha/graders/validate": {},
    "PATCH /v1/projects/{project}": {"json": {"limits": {"max_gpus": 1}}},
}
UNSUPPORTED = "/permissions"  # routes that answer every request with the reason why there is no such object


def operations(http: httpx.Client) -> list[tuple[str, str]]:
    paths: dict[str, dict[str, Any]] = http.get("/openapi.json").json()["paths"]
    return [(method.upper(), path) for path, of_path in paths.items() for method in of_path]


def error_in(response: httpx.Response) -> dict[str, Any]:
    """The error of a response in the standard shape, or in OpenAI's."""
    return response.json()["error"]


@dataclass(frozen=True)
class Objects:
    """The objects of project A: the values of the path parameters."""

    job_id: str
    file_id: str
    key_id: str
    sweep_id: str
    upload_id: str
    webhook_id: str
    project: str = "a"
    name: str = "final"
    path: str = "model.safetensors"

    def url(self, path: str) -> str:
        same_names = {"model": self.job_id, "batch_id": self.job_id, "checkpoint": f"{self.job_id}/final"}
        same_names |= {"permission_id": "permission", "webhook_endpoint_id": self.webhook_id}
        for name, value in {**vars(self), **same_names}.items():
            path = path.replace(f"{{{name}}}", value)
        assert "{" not in path, f"{path} has a parameter that this test doesn't know; add it to Objects"
        return path


@pytest.fixture(scope="module")
def objects(server: ServerProcess, rows: Rows) -> Objects:
    """A job with a checkpoint and a log, a file and a key in project A; keys in projects A and B."""
    with server.http() as admin:
        key = admin.post("/v1/keys", json={"name": SECRET_TEXT, "project": "a", "scopes": ["submit"]}).json()
        admin.post("/v1/projects", json={"name": "b"}).raise_for_status()
    for scope in Scope:
        rows.key(f"{scope}-of-b", project="b", scopes=[scope])
    with server.http(key["key"]) as http:
        file_id = http.post("/v1/files", **FILE).json()["id"]  # pyright: ignore[reportArgumentType]
        upload = {"bytes": 1, "filename": f"{SECRET_TEXT}.txt", "mime_type": "", "purpose": "fine-tune"}
        upload_id = http.post("/openai/v1/uploads", json=upload).json()["id"]
        job_id = submit(http, entity_name=SECRET_TEXT, metadata={"k": SECRET_TEXT})["id"]
        sweep_id = http.post("/v1/sweeps", json=SWEEP).json()["id"]
        webhook_id = http.post("/v1/webhooks", json={"url": f"https://example.org/{SECRET_TEXT}"}).json()["id"]
    rows.attempt(job_id, log=SECRET_TEXT, to=JobStatus.SUCCEEDED)
    rows.checkpoint(job_id, "final", 4, {"model.safetensors": ("weights", SECRET_TEXT.encode())})
    return Objects(job_id, file_id, key["id"], sweep_id, upload_id, webhook_id)


@pytest.fixture
def stranger(server: ServerProcess) -> Iterator[httpx.Client]:
    """A client with a key of project B that may read and submit."""
    with server.http("submit-of-b") as client:
        yield client


def test_every_route_declares_its_scope_and_every_declared_route_exists(http: httpx.Client) -> None:
    existing = {f"{method} {path}" for method, path in operations(http)}
    assert existing == SCOPES.keys() | OPEN
    assert not SCOPES.keys() & OPEN


@pytest.mark.parametrize("scope", list(Scope))
def test_a_key_is_refused_on_each_route_outside_its_scopes(
    server: ServerProcess, objects: Objects, scope: Scope
) -> None:
    with server.http(f"{scope}-of-b") as http:
        for method, path in operations(http):
            name = f"{method} {path}"
            if name in OPEN or allows([scope], SCOPES[name]):
                continue
            response = http.request(method, objects.url(path), **BODIES.get(name, {}))
            assert (response.status_code, error_in(response)["code"]) == (403, "insufficient_scope"), name
            assert (
                f"requires the scope '{SCOPES[name]}', and this API key has: {scope};" in error_in(response)["message"]
            )
            assert SECRET_TEXT not in response.text


KINDS = ("job", "file", "key", "sweep", "upload", "webhook")  # of the ids in `Objects`, in its order
ANSWERS = {"POST /openai/v1/chat/completions", "POST /openai/v1/completions"}  # they change nothing


def test_a_read_key_can_write_nothing_and_reads_nothing_confidential(server: ServerProcess, objects: Objects) -> None:
    with server.http("read-of-b") as http:
        refused = [
            f"{method} {path}"
            for method, path in operations(http)
            if http.request(method, objects.url(path), **BODIES.get(f"{method} {path}", {})).status_code == 403
        ]
        writes = {f"{method} {path}" for method, path in operations(http) if method != "GET"} - ANSWERS
        writes.remove("POST /v1/login-links")  # the link opens the dashboard with the same key
    confidential = {
        *("GET /v1/files/{file_id}/content", "GET /openai/v1/files/{file_id}/content", "GET /v1/webhooks"),
        *("GET /v1/webhooks/{webhook_id}", "GET /v1/webhooks/{webhook_id}/deliveries"),
        "GET /v1/jobs/{job_id}/deliveries",
        *("GET /openai/v1/webhook_endpoints", "GET /openai/v1/webhook_endpoints/{webhook_endpoint_id}"),
    }
    admin_reads = [name for name, scope in SCOPES.items() if scope == Scope.ADMIN and name.startswith("GET")]
    assert set(refused) == {*writes, *admin_reads, *confidential, "GET /metrics"}


def test_a_metrics_key_reads_only_the_metrics(server: ServerProcess) -> None:
    with server.http("metrics-of-b") as http:
        assert http.get("/metrics").status_code == 200
        assert http.get("/v1/jobs").status_code == 403
        assert [name for name, scope in SCOPES.items() if allows(["metrics"], scope)] == ["GET /metrics"]


def test_every_object_of_another_project_is_not_found(stranger: httpx.Client, objects: Objects) -> None:
    for method, path in operations(stranger):
        name = f"{method} {path}"
        if "{" not in path or not allows(["submit"], SCOPES[name]) or UNSUPPORTED in path:
            continue
        response = stranger.request(method, objects.url(path), **BODIES.get(name, {}))
        assert response.status_code == 404, (name, response.text)
        assert SECRET_TEXT not in response.text
        # A response about an object that doesn't exist differs only in the id.
        unknown = Objects(*(f"{kind}_{'0' * 24}" for kind in KINDS), project="zzz")
        missing = stranger.request(method, unknown.url(path), **BODIES.get(name, {}))
        same = missing.text
        for attribute in ("job_id", "file_id", "sweep_id", "upload_id", "webhook_id", "project"):
            same = same.replace(getattr(unknown, attribute), getattr(objects, attribute))
        assert (missing.status_code, same) == (404, response.text)


def test_lists_contain_nothing_of_another_project(stranger: httpx.Client, objects: Objects) -> None:
    for method, path in operations(stranger):
        if "{" not in path and f"{method} {path}" not in BODIES:
            response = stranger.request(method, path)
            assert SECRET_TEXT not in response.text
            assert objects.job_id not in response.text
            assert objects.file_id not in response.text
    assert [project["name"] for project in stranger.get("/v1/projects").json()["data"]] == ["b"]


def test_a_cursor_reveals_nothing_about_objects_of_another_project(
    stranger: httpx.Client, rows: Rows, objects: Objects
) -> None:
    old = "job_00000000000000000000000a"  # contains no time, so only the row has one
    rows.change(objects.job_id, entity_name=SECRET_TEXT)
    rows.copy_job(objects.job_id, old)
    for path, known in (
        ("/v1/jobs", old),
        ("/v1/jobs", objects.job_id),
        ("/v1/files", objects.file_id),
        ("/openai/v1/files", objects.file_id),
        ("/openai/v1/files", old.replace("job_", "file-metrics-")),
    ):
        unknown = known[:-1] + ("0" if known[-1] != "0" else "1")
        responses = [stranger.get(path, params={"after": after}) for after in (known, unknown)]
        first, second = (response.text.replace(unknown, known) for response in responses)
        assert (responses[0].status_code, first) == (responses[1].status_code, second)


def test_specs_cannot_refer_to_objects_of_another_project(stranger: httpx.Client, objects: Objects) -> None:
    for field in (
        {"dataset": {"file": objects.file_id}},
        {"model": {"job": objects.job_id, "checkpoint": "final"}},
        {"resume_from_checkpoint": f"{objects.job_id}/final"},
    ):
        for path in ("/v1/jobs", "/v1/jobs/validate"):
            response = stranger.post(path, json={**SPEC, **field})
            assert response.status_code == 422
            assert error_of(response)["code"] in ("file_not_found", "job_not_found", "invalid_value")
            assert SECRET_TEXT not in response.text


def test_equal_idempotency_keys_of_two_projects_are_independent(
    server: ServerProcess, stranger: httpx.Client, objects: Objects
) -> None:
    with server.http() as admin:
        jobs = [
            http.post("/v1/jobs", json=SPEC, headers={"Idempotency-Key": "same", **headers})
            for http, headers in ((stranger, {}), (admin, {"Zeta-Project": "a"}), (admin, {"Zeta-Project": "b"}))
        ]
        assert [response.status_code for response in jobs] == [201, 201, 201]
        assert len({response.json()["id"] for response in jobs}) == 3
        assert [response.json()["project"] for response in jobs] == ["b", "a", "b"]


def test_the_queue_position_counts_only_jobs_of_the_project(server: ServerProcess, stranger: httpx.Client) -> None:
    with server.http() as admin:
        before = submit(stranger)["queue_position"]
        for priority in (0, 5):
            admin.post(
                "/v1/jobs", json={**SPEC, "priority": priority}, headers={"Zeta-Project": "a"}
            ).raise_for_status()
        assert submit(stranger)["queue_position"] == before + 1
        assert submit(stranger, priority=5)["queue_position"] == 1


def test_an_admin_key_acts_in_the_project_that_the_header_names(server: ServerProcess, objects: Objects) -> None:
    in_a, job = {"Zeta-Project": "a"}, f"/v1/jobs/{objects.job_id}"
    with server.http() as admin:
        assert admin.get(job, headers=in_a).json()["entity_name"] == SECRET_TEXT
        assert objects.job_id not in admin.get("/v1/jobs").text
        assert objects.job_id in admin.get("/v1/jobs", headers=in_a).text
        assert admin.post(f"{job}/rerun", headers=in_a).json()["project"] == "a"
        response = admin.get(job)
        assert (response.status_code, error_of(response)["code"]) == (404, "job_not_found")
        assert (
            "it is in project 'a'; send the header 'Zeta-Project: a' (ZETA_PROJECT)." in error_of(response)["message"]
        )
        assert admin.get("/v1/jobs", headers={"Zeta-Project": "none"}).status_code == 404


def test_another_key_cannot_name_a_project_other_than_its_own(stranger: httpx.Client, objects: Objects) -> None:
    assert stranger.get("/v1/jobs", headers={"Zeta-Project": "b"}).status_code == 200
    for project in ("a", "none"):
        response = stranger.get("/v1/jobs", headers={"Zeta-Project": project})
        assert (response.status_code, error_of(response)["code"]) == (404, "project_not_found")


def test_metrics_and_health_name_no_object(server: ServerProcess, objects: Objects) -> None:
    with server.http("metrics-of-b") as http:
        text = http.get("/metrics").text + http.get("/readyz").text
    assert not any(value in text for value in (objects.job_id, objects.file_id, objects.key_id, SECRET_TEXT))
    wait_until(lambda: 'zeta_project_jobs{project="a",status="succeeded"}' in text, 5, "the counts by project")
