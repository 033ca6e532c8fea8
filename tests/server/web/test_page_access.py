"""Access to every page of the dashboard. The tests take the pages from its routes, so they cover new pages, too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from server.web.routes import ROUTERS
from tests.server.rows import Rows
from tests.server.server_process import API_KEY, SPEC, ServerProcess
from zeta_core.contract.job.status import JobStatus

SECRET_TEXT = "canary-of-the-project"
PUBLIC = ("/login", "/assets/{digest}/{name:path}")
FOR_ADMINS = ("/keys", "/projects", "/audit", "/workers/{name}/{action}")
OF_ALL_PROJECTS = ("/workers/{name}/use",)
WITH_CONTENT_OF_FILES = ("/files/{file_id}/rows",)
ROUTES = [
    (method, path)
    for router in ROUTERS
    for route in router.routes
    for method in sorted(getattr(route, "methods", set[str]()) - {"HEAD"})
    if (path := str(getattr(route, "path", ""))) not in PUBLIC
]
OF_OBJECTS = [(method, path) for method, path in ROUTES if "{" in path and path not in OF_ALL_PROJECTS]


@dataclass(frozen=True)
class Objects:
    """Objects of the project `default`: the values of the path parameters."""

    job_id: str
    file_id: str
    sweep_id: str
    webhook_id: str
    key_id: str = "key_000000000000000000000000"
    project: str = "default"
    name: str = "worker"
    command: str = "cancel"
    action: str = "disable"

    def url(self, path: str) -> str:
        for name, value in vars(self).items():
            path = path.replace(f"{{{name}}}", value)
        assert "{" not in path, f"{path} has a parameter that this test doesn't know; add it to Objects"
        return path


@pytest.fixture(scope="module")
def objects(server: ServerProcess, rows: Rows) -> Objects:
    """A job with a checkpoint and a log, a file, a sweep and a webhook; all contain the secret text."""
    with server.http() as http:
        files = {"file": (f"{SECRET_TEXT}.txt", f"{SECRET_TEXT} in a file".encode())}
        file_id = http.post("/v1/files", files=files, data={"purpose": "dataset"}).raise_for_status().json()["id"]
        spec = {**SPEC, "entity_name": SECRET_TEXT}
        sweep_id = (
            http.post("/v1/sweeps", json={"spec": spec, "grid": {"seed": [1, 2]}}).raise_for_status().json()["id"]
        )
        url = f"https://example.org/{SECRET_TEXT}"
        webhook_id = http.post("/v1/webhooks", json={"url": url}).raise_for_status().json()["id"]
    job_id = rows.job(spec={"entity_name": SECRET_TEXT, "metadata": {"k": SECRET_TEXT}})
    rows.attempt(job_id, log=SECRET_TEXT, to=JobStatus.SUCCEEDED)
    rows.checkpoint(job_id, "final", 4, {"model.safetensors": ("weights", b"x")})
    return Objects(job_id, file_id, sweep_id, webhook_id)


class Session:
    """A browser that has logged in with a key."""

    def __init__(self, server: ServerProcess, key: str) -> None:
        self.browser = server.http(None)
        assert self.browser.post("/login", data={"key": key}).status_code == 303
        self._token = re.findall(r'name="csrf_token" value="([^"]+)"', self.browser.get("/").text)[0]

    def request(self, method: str, path: str, *, token: bool = True) -> httpx.Response:
        data = {"csrf_token": self._token} if token and method == "POST" else None
        return self.browser.request(method, path, data=data)


def member(server: ServerProcess, http: httpx.Client, scope: str, project: str) -> Session:
    body = {"name": scope, "project": project, "scopes": [scope]}
    return Session(server, http.post("/v1/keys", json=body).raise_for_status().json()["key"])


@pytest.fixture
def nobody(server: ServerProcess) -> Iterator[httpx.Client]:
    with server.http(None) as browser:
        yield browser


def test_every_page_needs_a_session(nobody: httpx.Client, objects: Objects) -> None:
    assert len(ROUTES) >= 50
    for method, path in ROUTES:
        response = nobody.request(method, objects.url(path))
        assert (response.status_code, response.headers["Location"].partition("?")[0]) == (303, "/login"), path
        assert SECRET_TEXT not in response.text


def test_every_form_needs_the_csrf_token(server: ServerProcess, objects: Objects) -> None:
    admin = Session(server, API_KEY)
    for method, path in ROUTES:
        if method != "GET":
            response = admin.request(method, objects.url(path), token=False)
            assert (response.status_code, "CSRF" in response.text) == (403, True), path


def test_a_read_key_changes_nothing_and_sees_no_content_of_files(
    server: ServerProcess, http: httpx.Client, objects: Objects
) -> None:
    reader = member(server, http, "read", "default")
    for method, path in ROUTES:
        is_forbidden = method != "GET" or path in (*FOR_ADMINS, *WITH_CONTENT_OF_FILES)
        if path != "/logout" and is_forbidden:
            assert reader.request(method, objects.url(path)).status_code == 403, (method, path)
        elif method == "GET":
            assert f"{SECRET_TEXT} in a file" not in reader.request(method, objects.url(path)).text, path


def test_no_page_shows_an_object_of_another_project(
    server: ServerProcess, http: httpx.Client, objects: Objects
) -> None:
    stranger = member(server, http, "submit", "elsewhere")
    for method, path in ROUTES:
        if path == "/logout":
            continue
        response = stranger.request(method, objects.url(path))
        assert SECRET_TEXT not in response.text, path
        assert response.status_code < 500, path
        if path.startswith(FOR_ADMINS):
            assert response.status_code == 403, path
        elif (method, path) in OF_OBJECTS:
            assert response.status_code == 404, (method, path, response.text)
