"""Keys, projects and the audit log in the dashboard, and what a key's scopes and project allow on every page."""

import re
from collections.abc import Callable

import httpx
import pytest
from playwright.sync_api import expect

from tests.harness.browser import Visitor
from tests.server.rows import Rows
from tests.server.server_process import API_KEY, ServerProcess, submit
from tests.server.web.conftest import Jobs

Visit = Callable[..., Visitor]
ADMIN_PAGES = ("/keys", "/projects", "/audit")


@pytest.fixture
def reader(server: ServerProcess, http: httpx.Client) -> httpx.Client:
    """A browser whose key may only read."""
    key = http.post("/v1/keys", json={"name": "reader", "project": "default", "scopes": ["read"]}).json()["key"]
    browser = server.http(None)
    assert browser.post("/login", data={"key": key}).status_code == 303
    return browser


def csrf_token(browser: httpx.Client) -> str:
    return re.findall(r'name="csrf_token" value="([^"]+)"', browser.get("/").text)[0]


def test_a_key_is_created_used_and_revoked(visit: Visit, server: ServerProcess, http: httpx.Client) -> None:
    page = visit().page
    page.get_by_role("link", name="Keys").click()
    page.get_by_label("Name").fill("colleague")
    page.get_by_label("Project").fill("museum")
    page.get_by_role("button", name="Create").click()
    text = page.locator("pre").inner_text()
    assert text.startswith(f"export ZETA_URL={server.url}\nexport ZETA_API_KEY=zeta_")
    key = text.rpartition("=")[2].strip()
    with server.http(key) as colleague:
        assert colleague.get("/v1/keys/me").json()["project"] == "museum"
        page.on("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Revoke colleague").click()
        expect(page.get_by_text("colleague")).to_have_count(0)
        assert colleague.get("/v1/jobs").status_code == 401
    page.get_by_role("link", name="Audit").click()
    expect(page.get_by_text("key.revoke").first).to_be_visible()


def test_an_invalid_key_is_reported_in_the_form(server: ServerProcess) -> None:
    with server.http(None) as browser:
        browser.post("/login", data={"key": API_KEY})
        form = {"csrf_token": csrf_token(browser), "name": "n", "project": "Not Valid", "scope": "read", "days": "0"}
        response = browser.post("/keys", data=form)
        assert (response.status_code, "expire in 1 to 3650 days" in response.text) == (422, True)
        response = browser.post("/keys", data={**form, "days": ""})
        assert (response.status_code, "project" in response.text) == (422, True)


def test_an_admin_chooses_the_project_of_the_session(visit: Visit, rows: Rows, jobs: Jobs, http: httpx.Client) -> None:
    http.post("/v1/projects", json={"name": "library"})
    job_id = rows.job(project="library")
    page = visit().page
    page.get_by_role("link", name="default").click()
    page.get_by_role("button", name="Show its jobs (library)").click()
    expect(page.locator(".jobs .name")).to_have_text([job_id])
    assert page.request.get(f"{page.url}v1/jobs/{job_id}").ok
    assert page.request.get(f"{page.url}v1/jobs/{jobs.queued}").status == 404


def test_a_key_that_only_reads_sees_no_command(reader: httpx.Client, http: httpx.Client, jobs: Jobs) -> None:
    for path in ("/", f"/jobs/{jobs.failed}", f"/jobs/{jobs.succeeded}/checkpoints", "/files", "/workers"):
        text = reader.get(path).text
        forms = re.findall(r'<form[^>]*method="post"[^>]*action="([^"]+)"', text)
        assert forms == ["/logout"], path
    for path in ("/new", *ADMIN_PAGES):
        assert reader.get(path).status_code == (200 if path == "/new" else 403), path
    job, token = submit(http), csrf_token(reader)
    for path in (f"/jobs/{job['id']}/commands/cancel", f"/jobs/{job['id']}/delete", f"/jobs/{job['id']}/rerun", "/new"):
        assert reader.post(path, data={"csrf_token": token}).status_code == 403, path
    for path in ("/keys", "/projects", "/workers/w/drain", "/projects/default/choose"):
        assert reader.post(path, data={"csrf_token": token}).status_code == 403, path
    assert http.get(f"/v1/jobs/{job['id']}").json()["status"] == "queued"


def test_pages_show_nothing_of_another_project(server: ServerProcess, http: httpx.Client, jobs: Jobs) -> None:
    created = {"name": "stranger", "project": "elsewhere", "scopes": ["submit"]}
    key = http.post("/v1/keys", json=created).json()["key"]
    with server.http(None) as browser:
        browser.post("/login", data={"key": key})
        assert "No jobs yet" in browser.get("/").text
        tabs = ("", "/header", "/curves", "/log", "/events", "/checkpoints", "/chat", "/data", "/settings")
        for path in (*(f"/jobs/{jobs.succeeded}{tab}" for tab in tabs), f"/new?edit={jobs.failed}"):
            response = browser.get(path)
            assert (response.status_code, "beta" in response.text) == (404, False), path
        assert browser.get(f"/compare?job={jobs.failed}&job={jobs.succeeded}").status_code == 404
        token = csrf_token(browser)
        for path in (f"/jobs/{jobs.succeeded}/delete", f"/jobs/{jobs.failed}/rerun"):
            assert browser.post(path, data={"csrf_token": token}).status_code == 404, path


def test_a_metrics_key_cannot_log_in(server: ServerProcess, http: httpx.Client) -> None:
    body = {"name": "prometheus", "project": "default", "scopes": ["metrics"]}
    key = http.post("/v1/keys", json=body).json()["key"]
    with server.http(None) as browser:
        assert browser.post("/login", data={"key": key}).status_code == 401


def test_rotating_a_key_ends_its_sessions(reader: httpx.Client, http: httpx.Client) -> None:
    key_id = reader.get("/v1/keys/me").json()["id"]
    http.post(f"/v1/keys/{key_id}/rotate")
    assert reader.get("/v1/jobs").status_code == 401


def test_the_limits_of_the_project_are_shown_with_their_use(visit: Visit, http: httpx.Client) -> None:
    http.patch("/v1/projects/default", json={"limits": {"max_stored_bytes": 1024}}).raise_for_status()
    visitor = visit()
    visitor.open("/files")
    visitor.page.get_by_role("link", name="Limits of the project").click()
    row = visitor.page.get_by_role("row", name="max_stored_bytes")
    expect(row).to_contain_text("1.0 KiB")
    expect(row.locator("progress")).to_have_attribute("value", re.compile(r"^0\.\d+$"))
    http.patch("/v1/projects/default", json={"limits": {"max_stored_bytes": None}}).raise_for_status()
