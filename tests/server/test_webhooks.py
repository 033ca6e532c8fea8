"""Creating and changing webhooks over HTTP, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.harness.valkey import ValkeyServer
from tests.server.server_process import SPEC, ServerProcess, error_of, running_server

URL = "https://hooks.example.org/zeta"


@pytest.fixture(scope="module")
def server(
    module_database_url: str | None, shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    home = tmp_path_factory.mktemp("server")
    with running_server(home, shared_valkey.second_url, module_database_url) as process:
        yield process


def create(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = http.post("/v1/webhooks", json={"url": URL, **fields})
    assert response.status_code == 201, response.text
    assert response.headers["location"] == f"/v1/webhooks/{response.json()['id']}"
    return response.json()


def test_a_secret_is_shown_once(server: ServerProcess, http: httpx.Client) -> None:
    created = create(http, name="CI")
    secret = created.pop("secret")
    assert secret.startswith("whsec_")
    assert http.get(f"/v1/webhooks/{created['id']}").json() == created
    assert secret not in http.get("/v1/webhooks").text
    assert created["events"] == ["job.cancelled", "job.failed", "job.succeeded"]
    assert secret not in server.log()
    rotated = http.post(f"/v1/webhooks/{created['id']}/rotate").json()
    assert rotated["secret"] not in (secret, None)


def test_webhooks_are_listed_newest_first_and_changed(http: httpx.Client) -> None:
    ids = [create(http)["id"] for _ in range(3)]
    listed = http.get("/v1/webhooks", params={"limit": 2}).json()
    assert [webhook["id"] for webhook in listed["data"]] == [ids[2], ids[1]]
    rest = http.get("/v1/webhooks", params={"after": listed["last_id"]}).json()["data"]
    assert ids[0] in [webhook["id"] for webhook in rest]
    change = {"url": "https://hooks.slack.com/services/T/B/x", "events": ["job.failed"], "name": None}
    changed = http.patch(f"/v1/webhooks/{ids[0]}", json=change).json()
    assert (changed["url"], changed["events"], changed["format"]) == (change["url"], ["job.failed"], "slack")
    disabled = http.patch(f"/v1/webhooks/{ids[0]}", json={"enabled": False}).json()
    assert (disabled["enabled"], disabled["format"]) == (False, "slack")
    assert http.delete(f"/v1/webhooks/{ids[0]}").json()["deleted"] is True
    assert http.get(f"/v1/webhooks/{ids[0]}").status_code == 404


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://example.org/", "url is 'ftp://example.org/'"),
        ("https://user:secret@example.org/", "must not contain a user name or password"),
        ("https://example.org/#part", "must not contain a fragment"),
        ("https://example.org:22/", "its port must be 80, 443, or at least 1024"),
        ("https://example.org/ä", "printable ASCII"),
        ("https:///path", "it must be a URL such as"),
        ("https://[::1", "it is not a valid URL"),
        ("http://127.0.0.1/", "it is an address of the server or of a private network"),
        ("http://169.254.169.254/latest/meta-data", "it is an address of the server or of a private network"),
        ("http://[fd00::1]:8080/", "it is an address of the server or of a private network"),
        ("mailto:a@example.org,b@example.org", "it must name one address"),
        ("mailto:a@example.org?bcc=b@example.org", "it must name one address"),
        ("mailto:team@example.org", "this server sends no e-mail"),
    ],
)
def test_a_url_that_can_never_be_used_is_refused_with_the_reason(http: httpx.Client, url: str, reason: str) -> None:
    response = http.post("/v1/webhooks", json={"url": url})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (422, "url")
    assert reason in error["message"]
    response = http.post("/v1/jobs", json={**SPEC, "notify": [{"to": url}]})
    assert (response.status_code, error_of(response)["param"]) == (422, "notify.0.to")


@pytest.mark.parametrize(
    ("notify", "param"),
    [
        ([{"to": URL, "events": ["job.started"]}], "notify.0.events.0"),
        ([{"to": URL, "events": []}], "notify.0.events"),
        ([{"to": URL}, {"to": URL}], "notify.1.to"),
        ([{"to": "webhook_01kbacdefghjkmnpqrstvwxy"}], "notify.0.to"),
        ([{"to": URL, "when": "now"}], "notify.0.when"),
        ([{"to": "someone"}], "notify.0.to"),
        ([{"to": URL + str(number)} for number in range(11)], "notify"),
    ],
)
def test_invalid_notifications_of_a_spec_are_named(http: httpx.Client, notify: Any, param: str) -> None:
    for path in ("/v1/jobs", "/v1/jobs/validate"):
        response = http.post(path, json={**SPEC, "notify": notify})
        assert (response.status_code, error_of(response)["param"]) == (422, param), response.text


def test_a_project_has_a_limited_number_of_webhooks(server: ServerProcess, http: httpx.Client) -> None:
    key = http.post("/v1/keys", json={"name": "n", "project": "many", "scopes": ["submit"]}).json()["key"]
    with server.http(key) as colleague:
        for _ in range(100):
            create(colleague)
        response = colleague.post("/v1/webhooks", json={"url": URL})
    assert (response.status_code, error_of(response)["code"]) == (409, "too_many_webhooks")


def test_changes_of_webhooks_are_in_the_audit_log(http: httpx.Client) -> None:
    webhook_id = create(http)["id"]
    http.patch(f"/v1/webhooks/{webhook_id}", json={"name": "new"}).raise_for_status()
    http.delete(f"/v1/webhooks/{webhook_id}").raise_for_status()
    entries = http.get("/v1/audit", params={"object_id": webhook_id}).json()["data"]
    assert [entry["action"] for entry in entries] == ["webhook.delete", "webhook.change", "webhook.create"]
