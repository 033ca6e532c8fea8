"""API keys, projects and the audit log over HTTP."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import DatabaseError

from server.auth import Keys, register_admin_key
from server.database.access_tables import KeyRow
from server.database.connections import Database
from tests.harness.waiting import wait_until
from tests.server.rows import Rows
from tests.server.server_process import API_KEY, SPEC, ServerProcess, error_of, running_server, submit
from zeta_core.contract.errors import InvalidSettings
from zeta_core.contract.job.events import utc_now


def create(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = http.post("/v1/keys", json={"name": "laptop", "scopes": ["submit"], **fields})
    assert response.status_code == 201, response.text
    return response.json()


def status_with(server: ServerProcess, key: str) -> int:
    with server.http(key) as http:
        return http.get("/v1/jobs").status_code


def entries(http: httpx.Client, **filters: str) -> list[dict[str, Any]]:
    return http.get("/v1/audit", params=filters).json()["data"]


# --- Keys -------------------------------------------------------------------------------------------------------------


def test_a_new_key_is_shown_once_and_works_in_its_project(server: ServerProcess, http: httpx.Client) -> None:
    created = create(http, project="vision")
    text_of_key = created.pop("key")
    assert text_of_key.startswith("zeta_")
    assert created.pop("is_new_project") is True
    assert create(http, project="vision")["is_new_project"] is False
    assert http.get(f"/v1/keys/{created['id']}").json() == created
    assert text_of_key not in http.get("/v1/keys").text
    with server.http(text_of_key) as colleague:
        assert submit(colleague)["project"] == "vision"
        own = colleague.get("/v1/keys/me").json()
    assert (own["id"], own["project"], own["scopes"]) == (created["id"], "vision", ["submit"])
    stored = b"".join(file.read_bytes() for file in server.home.glob("zeta.db*")) + server.log().encode()
    assert text_of_key.encode() not in stored


def test_keys_are_listed_newest_first_by_project_without_revoked_ones(http: httpx.Client) -> None:
    ids = [create(http, project="listed")["id"] for _ in range(3)]
    http.delete(f"/v1/keys/{ids[1]}").raise_for_status()

    def listed(**params: Any) -> list[str]:
        return [key["id"] for key in http.get("/v1/keys", params={"project": "listed", **params}).json()["data"]]

    assert listed() == [ids[2], ids[0]]
    assert listed(include_revoked=True) == ids[::-1]
    assert listed(include_revoked=True, limit=1, after=ids[2]) == [ids[1]]
    assert {ids[0], ids[2]} <= {key["id"] for key in http.get("/v1/keys").json()["data"]}


def test_a_revoked_key_stops_working_at_once(server: ServerProcess, http: httpx.Client) -> None:
    key = create(http)
    assert status_with(server, key["key"]) == 200
    for _ in range(2):
        response = http.delete(f"/v1/keys/{key['id']}")
        assert response.json() == {"id": key["id"], "object": "key", "deleted": True}
        assert status_with(server, key["key"]) == 401
    assert http.get(f"/v1/keys/{key['id']}").json()["revoked_at"] is not None
    assert error_of(http.post(f"/v1/keys/{key['id']}/rotate"))["code"] == "key_revoked"


def test_a_rotated_key_keeps_its_id_and_forgets_its_old_text(server: ServerProcess, http: httpx.Client) -> None:
    key = create(http)
    rotated = http.post(f"/v1/keys/{key['id']}/rotate").json()
    assert (rotated["id"], rotated["name"]) == (key["id"], key["name"])
    assert (status_with(server, key["key"]), status_with(server, rotated["key"])) == (401, 200)


def test_an_old_text_works_for_the_grace_period(server: ServerProcess, http: httpx.Client) -> None:
    key = create(http)
    rotated = http.post(f"/v1/keys/{key['id']}/rotate", json={"grace_seconds": 1}).json()
    assert rotated["old_text_expires_at"] is not None
    assert (status_with(server, key["key"]), status_with(server, rotated["key"])) == (200, 200)
    wait_until(lambda: status_with(server, key["key"]) == 401, 10, "the grace period to end")
    assert status_with(server, rotated["key"]) == 200


def test_a_key_stops_working_when_it_expires(server: ServerProcess, http: httpx.Client) -> None:
    key = create(http, expires_at=(utc_now() + timedelta(seconds=1)).isoformat())
    assert status_with(server, key["key"]) == 200
    wait_until(lambda: status_with(server, key["key"]) == 401, 10, "the key to expire")
    response = http.post("/v1/keys", json={"name": "n", "scopes": ["read"], "expires_at": "2020-01-01T00:00:00Z"})
    assert (response.status_code, error_of(response)["param"]) == (422, "expires_at")


def test_the_key_in_the_settings_cannot_be_revoked_or_rotated(http: httpx.Client) -> None:
    own = http.get("/v1/keys/me").json()
    assert (own["created_by"], own["scopes"]) == ("settings", ["admin"])
    for method, path in (("DELETE", ""), ("POST", "/rotate")):
        response = http.request(method, f"/v1/keys/{own['id']}{path}")
        assert (response.status_code, error_of(response)["code"]) == (409, "key_in_settings")


def test_the_text_of_a_created_key_is_refused_as_the_key_in_the_settings(
    server: ServerProcess, http: httpx.Client
) -> None:
    key = create(http, scopes=["read"])
    assert http.delete(f"/v1/keys/{key['id']}").is_success

    async def register() -> None:
        database = Database(server.settings.database)
        try:
            await register_admin_key(database, key["key"])
        finally:
            await database.close()

    with pytest.raises(InvalidSettings, match=f"ZETA_API_KEY is the text of key {key['id']}"):
        asyncio.run(register())
    assert http.get(f"/v1/keys/{key['id']}").json()["revoked_at"] is not None
    assert http.get("/v1/keys/me").json()["created_by"] == "settings", "the admin key still works"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"scopes": ["write"]}, "scopes.0", "scopes.0 is 'write'; it must be 'read', 'submit', 'admin' or 'metrics'."),
        ({"scopes": []}, "scopes", "scopes is []; it must be of at least 1 entries."),
        ({"name": ""}, "name", "name is ''; it must be text of at least 1 characters."),
        ({"name": "a\nb"}, "name", "name is 'a\\nb': it contains the control character U+000A; remove it."),
        ({"project": "Not A Name"}, "project", "project is 'Not A Name'; it must"),
        ({"expires_at": "tomorrow"}, "expires_at", "expires_at is 'tomorrow'; it must"),
        ({"expires_at": "2030-01-01T00:00:00"}, "expires_at", "expires_at is '2030-01-01T00:00:00'; it must"),
        ({"scope": "read"}, "scope", "'scope' is not a known field; did you mean 'scopes'?"),
        ({"id": "key_1"}, "id", "'id' is not a known field"),
    ],
)
def test_an_invalid_key_request_is_refused_with_the_fix(
    http: httpx.Client, fields: dict[str, Any], param: str, message: str
) -> None:
    response = http.post("/v1/keys", json={"name": "n", "scopes": ["read"], **fields})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (422, param)
    assert error["message"].startswith(message)


@pytest.mark.anyio
async def test_the_last_use_is_recorded_at_most_once_a_minute(rows: Rows) -> None:
    await asyncio.to_thread(rows.key, "used")
    database = Database(rows.settings.database)
    keys = Keys(database)
    caller = await keys.authenticate("used")

    async def last_used() -> Any:
        async with database.read() as session:
            return (await session.get_one(KeyRow, caller.key_id)).last_used_at

    assert await last_used() is None
    await keys.record_uses()
    first = await last_used()
    assert first is not None
    for _ in range(3):
        await keys.authenticate("used")
        await keys.record_uses()
    assert await last_used() == first
    await database.close()


def test_the_server_records_when_a_key_was_used(server: ServerProcess, http: httpx.Client) -> None:
    key = create(http)
    assert key["last_used_at"] is None
    assert status_with(server, key["key"]) == 200
    used = f"/v1/keys/{key['id']}"
    wait_until(lambda: http.get(used).json()["last_used_at"] is not None, 20, "the last use to be recorded")


# --- Projects ---------------------------------------------------------------------------------------------------------


def test_a_project_is_created_listed_and_deleted_when_empty(http: httpx.Client) -> None:
    created = http.post("/v1/projects", json={"name": "speech"})
    assert (created.status_code, created.headers["location"]) == (201, "/v1/projects/speech")
    assert http.get("/v1/projects/speech").json() == created.json()
    again = http.post("/v1/projects", json={"name": "speech"})
    assert (again.status_code, error_of(again)["code"]) == (409, "name_taken")
    names = [project["name"] for project in http.get("/v1/projects", params={"limit": 1000}).json()["data"]]
    assert names == sorted(names)
    assert {"default", "speech"} <= set(names)
    after = http.get("/v1/projects", params={"after": "speecg", "limit": 1}).json()
    assert [project["name"] for project in after["data"]] == ["speech"]
    key = create(http, project="speech")
    refused = http.delete("/v1/projects/speech")
    assert (refused.status_code, error_of(refused)["code"]) == (409, "project_in_use")
    assert "Project speech contains keys;" in error_of(refused)["message"]
    http.delete(f"/v1/keys/{key['id']}").raise_for_status()
    in_speech = {"Zeta-Project": "speech"}
    new_upload = {"bytes": 1, "filename": "a.jsonl", "mime_type": "text/plain", "purpose": "fine-tune"}
    upload = http.post("/openai/v1/uploads", json=new_upload, headers=in_speech).raise_for_status().json()
    assert "Project speech contains unfinished uploads;" in error_of(http.delete("/v1/projects/speech"))["message"]
    http.post(f"/openai/v1/uploads/{upload['id']}/cancel", headers=in_speech).raise_for_status()
    http.post("/v1/models", json={"name": "own", "model": SPEC["model"]}, headers=in_speech).raise_for_status()
    assert http.delete("/v1/projects/speech").json() == {"id": "speech", "object": "project", "deleted": True}
    assert http.get("/v1/projects/speech").status_code == 404
    http.post("/v1/projects", json={"name": "speech"}).raise_for_status()
    assert http.get("/v1/models", headers=in_speech).json()["data"] == []
    http.delete("/v1/projects/speech").raise_for_status()
    assert http.delete("/v1/projects/default").status_code == 409


# --- Audit ------------------------------------------------------------------------------------------------------------


def test_every_change_is_recorded_with_who_what_and_from_where(server: ServerProcess, http: httpx.Client) -> None:
    key = create(http, project="audited", name="robot")
    with server.http(key["key"]) as robot:
        job = submit(robot)["id"]
        robot.post(f"/v1/jobs/{job}/cancel").raise_for_status()
        rerun = robot.post(f"/v1/jobs/{job}/rerun").json()["id"]
        robot.post(f"/v1/jobs/{rerun}/cancel").raise_for_status()
        robot.delete(f"/v1/jobs/{job}").raise_for_status()
        upload = {"files": {"file": ("a.txt", b"text")}, "data": {"purpose": "dataset"}}
        file = robot.post("/v1/files", **upload).json()["id"]  # pyright: ignore[reportArgumentType]
        robot.delete(f"/v1/files/{file}").raise_for_status()
        assert robot.post("/v1/jobs", json={**SPEC, "batch_size": -1}).status_code == 422  # no change, no entry
    http.post(f"/v1/keys/{key['id']}/rotate").raise_for_status()
    http.delete(f"/v1/keys/{key['id']}").raise_for_status()
    found = entries(http, project="audited", limit="100")[::-1]
    assert [(entry["action"], entry["object_id"]) for entry in found] == [
        ("project.create", "audited"),
        ("key.create", key["id"]),
        ("job.submit", job),
        ("job.cancel", job),
        ("job.rerun", rerun),
        ("job.cancel", rerun),
        ("job.delete", job),
        ("file.upload", file),
        ("file.delete", file),
        ("key.rotate", key["id"]),
        ("key.revoke", key["id"]),
    ]
    assert {entry["address"] for entry in found} == {"127.0.0.1"}
    assert [entry["key_name"] for entry in found] == ["admin"] * 2 + ["robot"] * 7 + ["admin"] * 2
    assert found[1]["details"] == {"name": "robot", "scopes": ["submit"]}
    assert found[4]["details"] == {"parent": job}
    assert [entry["action"] for entry in entries(http, object_id=job, action="job.cancel")] == ["job.cancel"]
    assert {entry["key_name"] for entry in entries(http, key_id=key["id"])} == {"robot"}


def test_the_audit_log_is_paged_newest_first(http: httpx.Client) -> None:
    for _ in range(3):
        create(http, project="paged")
    first = http.get("/v1/audit", params={"project": "paged", "limit": 2}).json()
    rest = http.get("/v1/audit", params={"project": "paged", "after": first["last_id"]}).json()
    assert [len(page["data"]) for page in (first, rest)] == [2, 2]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    response = http.get("/v1/audit", params={"after": "1"})
    assert (response.status_code, error_of(response)["param"]) == (422, "after")


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_the_database_refuses_to_change_the_audit_log(
    kind: str, tmp_path: Path, redis_url: str, request: pytest.FixtureRequest
) -> None:
    url = str(request.getfixturevalue("postgres_url")) if kind == "postgresql" else None
    with running_server(tmp_path / "home", redis_url, url) as server, server.http() as http:
        submit(http)
        driver = "postgresql+psycopg" if kind == "postgresql" else "sqlite"
        engine = create_engine(make_url(server.settings.database).set(drivername=driver))
        for statement in ("UPDATE audit SET key_name = 'x'", "DELETE FROM audit"):
            with pytest.raises(DatabaseError, match="append-only"), engine.begin() as connection:
                connection.execute(text(statement))
        engine.dispose()
        assert [entry["action"] for entry in entries(http)] == ["job.submit"]
        assert status_with(server, API_KEY) == 200
