"""All errors of all routes have one shape, the right status and a request id, and reveal no internals."""

import json
import socket
import sqlite3
from typing import Any

import httpx
import pytest

from tests.server.server_process import API_KEY, SPEC, ServerProcess, error_of, submit
from zeta_core.contract.printable import printable

OPEN = {"/healthz", "/readyz"}


def operations(http: httpx.Client) -> list[tuple[str, str]]:
    """The routes with errors in the standard shape; `tests/server/openai` checks those with OpenAI's shape."""
    paths: dict[str, dict[str, Any]] = http.get("/openapi.json").json()["paths"]
    return [
        (method.upper(), path)
        for path, of_path in paths.items()
        for method in of_path
        if not path.startswith("/openai/")
    ]


def with_job_id(path: str, job_id: str = "job_00000000000000000000") -> str:
    ids = {"job_id": job_id, "file_id": "file_none", "key_id": "key_none", "project": "nobody"}
    for name, value in {**ids, "name": "final", "path": "a/b"}.items():
        path = path.replace(f"{{{name}}}", value)
    return path


def test_every_route_except_the_open_ones_requires_a_key(server: ServerProcess, http: httpx.Client) -> None:
    protected = [(method, path) for method, path in operations(http) if path not in OPEN]
    assert len(protected) >= 17
    for key in (None, "wrong", API_KEY + "x", ""):
        with server.http(key) as stranger:
            for method, path in protected:
                response = stranger.request(method, with_job_id(path))
                assert response.status_code == 401, (method, path, response.text)
                assert error_of(response)["type"] == "authentication_error"
                assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("header", ["Basic dXNlcjpwYXNz", "Bearer", "Bearer ", f"bearer  {API_KEY} x", API_KEY])
def test_an_invalid_authorization_header_is_rejected(server: ServerProcess, header: str) -> None:
    response = httpx.get(f"{server.url}/v1/jobs", headers={"Authorization": header.strip()})
    assert (response.status_code, error_of(response)["type"]) == (401, "authentication_error")


def test_the_open_routes_require_no_key(server: ServerProcess) -> None:
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert httpx.get(server.url + path).status_code == 200


def test_every_route_reports_an_unknown_id_in_the_standard_shape(http: httpx.Client) -> None:
    for method, path in operations(http):
        if "{" in path:
            response = http.request(method, with_job_id(path))
            assert response.status_code == 404, (method, path, response.text)
            assert error_of(response)["type"] == "not_found_error"


@pytest.mark.parametrize("job_id", ["%00", "..", "%2e%2e", "job_%ff", "job_" + "x" * 5000, "a%0ab", "job_0'\"--"])
def test_an_invalid_id_is_not_found(http: httpx.Client, job_id: str) -> None:
    response = http.get(f"/v1/jobs/{job_id}/events")
    assert (response.status_code, error_of(response)["type"]) == (404, "not_found_error")


def test_unknown_paths_and_methods_are_reported(http: httpx.Client) -> None:
    response = http.get("/v1/nothing")
    assert (response.status_code, error_of(response)["code"]) == (404, "route_not_found")
    for path in ("/v1/jobs/", "//v1/jobs", "/docs", "/v1/jobs/x/pause/now"):
        assert http.get(path).status_code == 404
    for method, path in operations(http):
        response = http.request("TRACE", with_job_id(path))
        assert (response.status_code, error_of(response)["type"]) == (405, "method_not_allowed_error")
        assert method in response.headers["allow"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b'{"a": NaN}', 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[" * 60_000, 400, "too_deep"),
        (b'{"model": ' + b'{"a":' * 150 + b"1" + b"}" * 151, 400, "too_deep"),
        (b'{"max_steps": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b'{"batch_size": 1, "batch_size": 2}', 422, "duplicate_field"),
        (b'{"metadata": {"\\ud800": "a", "\\ud800": "b"}}', 422, "invalid_text"),
        (b"[]", 422, "invalid_type"),
        (b'"text"', 422, "invalid_type"),
        (b"null", 422, "invalid_type"),
        (b'{"entity_name": "a\\u0000b"}', 422, "invalid_text"),
        (b'{"metadata": {"k": "\\ud800"}}', 422, "invalid_text"),
        (b'{"\\ud800": 1}', 422, "invalid_text"),
        (b'{"model": {"config": {"x": 1e999}}}', 422, "out_of_range"),
        (b'{"metadata": {"k": "' + b"x" * (1 << 20) + b'"}}', 413, "too_large"),
    ],
)
def test_a_body_that_is_not_a_spec_is_rejected(http: httpx.Client, body: bytes, status: int, code: str) -> None:
    response = http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, error_of(response)["code"]) == (status, code), response.text


def test_a_body_without_a_length_is_limited(http: httpx.Client) -> None:
    response = http.post("/v1/jobs", content=(b" " * 65536 for _ in range(32)))
    assert (response.status_code, error_of(response)["type"]) == (413, "too_large_error")


def test_every_invalid_field_is_reported_with_value_and_cure(http: httpx.Client) -> None:
    spec = {
        **SPEC,
        "batch_size": -1,
        "seq_len": 65,
        "output_dir": "../elsewhere",
        "resume_from_checkpoint": "/etc/passwd",
        "gradient_accumulation_steps": 2,
        "resources": {"nodes": 2, "gpus": "all"},
    }
    response = http.post("/v1/jobs", json=spec)
    error = error_of(response)
    assert response.status_code == 422
    details = {detail["param"]: detail for detail in error["details"]}
    named = {"batch_size", "seq_len", "output_dir", "resume_from_checkpoint", "gradient_accumulation_steps"}
    assert named | {"resources.gpus"} <= details.keys()
    assert "-1" in details["batch_size"]["message"]
    assert "64" in details["seq_len"]["message"]
    assert details["gradient_accumulation_steps"]["suggestion"] == "gradient_accumulate_every"
    assert "every node needs the same number of GPUs" in details["resources.gpus"]["message"]


@pytest.mark.parametrize(
    ("path", "message", "suggestion"),
    [
        ("jobs?limit=0", "limit is '0'; it must be at least 1.", None),
        ("jobs?limit=1001", "limit is '1001'; it must be at most 1000.", None),
        ("jobs?limit=many", "limit is 'many'; it must be a whole number.", None),
        ("jobs?status=finished", "status is 'finished'; it must be 'queued', 'running', 'paused',", None),
        ("jobs?status=suceeded", "status is 'suceeded'; it must be 'queued', 'running', 'paused',", "succeeded"),
        ("jobs?state=queued", "'state' is not a known parameter; did you mean 'status'?", "status"),
        ("jobs?entity_nam=x", "'entity_nam' is not a known parameter; did you mean 'entity_name'?", "entity_name"),
        ("jobs?metadata=x", "'metadata' is not a known parameter; did you mean 'metadata[k]'?", "metadata[k]"),
        ("jobs?after=job_00000000000000000000", "after is 'job_00000000000000000000', which is not a valid id", None),
        ("jobs?after=%00", "after is ", None),
        ("files?after=x", "after is 'x', which is not a valid id; use the last_id of an earlier page.", None),
        ("files?sha=x", "'sha' is not a known parameter; did you mean 'sha256'?", "sha256"),
        ("workers?limit=-1", "limit is '-1'; it must be at least 1.", None),
        ("jobs/{job}/events?after=-1", "after is '-1'; it must be at least 0.", None),
        ("jobs/{job}/events?after=99999999999999999999", "after is '99999999999999999999'; it must be less", None),
        ("jobs/{job}/logs?follow=maybe", "follow is 'maybe'; it must be true or false.", None),
        ("jobs/{job}/logs?tail=-1", "tail is '-1'; it must be at least 0.", None),
        ("jobs/{job}/metrics?max_points=0", "max_points is '0'; it must be at least 1.", None),
    ],
)
def test_an_invalid_parameter_is_reported_with_value_and_cure(
    http: httpx.Client, path: str, message: str, suggestion: str | None
) -> None:
    response = http.get("/v1/" + path.replace("{job}", submit(http)["id"]))
    error = error_of(response)
    (detail,) = error["details"]
    assert response.status_code == 422
    assert error["param"] == detail["param"] == path.partition("?")[2].partition("=")[0]
    assert error["message"] == detail["message"]
    assert error["message"].startswith(message), error
    assert detail["suggestion"] == suggestion


def test_every_route_rejects_unknown_parameters(server: ServerProcess, http: httpx.Client) -> None:
    protected = [(method, path) for method, path in operations(http) if path not in OPEN]
    protected += [("HEAD", path) for method, path in protected if method == "GET"]
    for method, path in protected:
        response = http.request(method, with_job_id(path), params={"stat": "x"})
        assert response.status_code == 422, (method, path, response.text)
        if method != "HEAD":
            (detail,) = error_of(response)["details"]
            assert (detail["param"], detail["code"]) == ("stat", "unknown_parameter")
    response = http.post("/v1/jobs?dry_run=true&x=1", json=SPEC)
    assert [detail["message"] for detail in error_of(response)["details"]] == [
        "'dry_run' is not a known parameter; known parameters: none.",
        "'x' is not a known parameter; known parameters: none.",
    ]
    assert (
        http.head(with_job_id("/v1/jobs/{job_id}/checkpoints/{name}/archive"), params={"state": "true"}).status_code
        == 404
    )
    with server.http(None) as stranger:
        assert stranger.get("/v1/jobs?x=1").status_code == 401
        assert stranger.get("/healthz?x=1").status_code == 200


def test_head_returns_the_headers_of_get(server: ServerProcess, http: httpx.Client) -> None:
    job = submit(http)
    file = http.post("/v1/files", files={"file": ("a.txt", b"text")}, data={"purpose": "dataset"}).json()
    for _, path in [operation for operation in operations(http) if operation[0] == "GET"]:
        for url in (with_job_id(path), path.replace("{job_id}", job["id"]).replace("{file_id}", file["id"])):
            whole, head = http.get(url), http.head(url)
            assert (head.status_code, head.content) == (whole.status_code, b""), url
            assert head.headers["content-type"] == whole.headers["content-type"], url
    live = {"Accept": "text/event-stream"}
    assert http.head(f"/v1/jobs/{job['id']}/events", headers=live).headers["content-type"].startswith(live["Accept"])
    assert http.head(f"/v1/jobs/{job['id']}/logs?follow=true").status_code == 200
    with server.http(None) as stranger:
        assert stranger.head("/v1/jobs").status_code == 401


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=1&limit=2", "limit"),
        ("after=&status=queued&after=", "after"),
        ("metadata[k]=a&metadata[k]=b", "metadata[k]"),
        ("entity_name=a&entity_name=a&entity_name=a", "entity_name"),
    ],
)
def test_a_repeated_parameter_is_rejected(http: httpx.Client, query: str, param: str) -> None:
    response = http.get(f"/v1/jobs?{query}")
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (422, param, "invalid_parameter")
    assert http.get("/v1/jobs?status=queued&status=paused").status_code == 200


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/%1b%5B31m%0A", r"\x1b[31m\x0a"),
        ("/v1/jobs?%1b]0;title%07=1", r"\x1b]0;title\x07"),
        ("/v1/jobs?limit=1&%C2%9B2J=1", r"\x9b2J"),
        ("/v1/%E2%80%AEslobj", r"\u202eslobj"),
    ],
)
def test_errors_escape_terminal_control_characters(http: httpx.Client, path: str, shown: str) -> None:
    error = error_of(http.get(path))
    assert shown in error["message"]
    texts = [error["message"], error["param"] or ""]
    texts += [text or "" for detail in error["details"] for text in detail.values()]
    assert [text for text in texts if printable(text) != text] == []


def test_an_internal_error_reveals_only_its_request_id(server: ServerProcess) -> None:
    with server.http() as http:
        job = submit(http)
        with sqlite3.connect(server.home / "zeta.db") as database:  # damage that no version of ours writes
            database.execute("UPDATE jobs SET warnings = '\"secret-insides\"' WHERE id = ?", (job["id"],))
        response = http.get(f"/v1/jobs/{job['id']}", headers={"X-Request-Id": "mine-1"})
        error = error_of(response)
        with sqlite3.connect(server.home / "zeta.db") as database:
            database.execute("DELETE FROM jobs WHERE id = ?", (job["id"],))
    assert (response.status_code, error["type"], response.headers["x-request-id"]) == (500, "internal_error", "mine-1")
    assert "mine-1" in error["message"]
    assert "secret-insides" not in response.text
    assert "Traceback" not in response.text
    assert "secret-insides" in server.log()


def test_a_safe_request_id_of_the_client_is_kept(http: httpx.Client) -> None:
    assert http.get("/healthz", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert http.get("/healthz", headers={"X-Request-Id": "a b\tc"}).headers["x-request-id"].startswith("req_")


def test_an_unavailable_database_returns_503_until_it_recovers(server: ServerProcess, http: httpx.Client) -> None:
    with sqlite3.connect(server.home / "zeta.db") as database:
        database.execute("ALTER TABLE files RENAME TO files_away")
    try:
        response = http.get("/v1/files")
        assert (response.status_code, error_of(response)["type"]) == (503, "unavailable_error")
        assert "no such table" not in response.text
    finally:
        with sqlite3.connect(server.home / "zeta.db") as database:
            database.execute("ALTER TABLE files_away RENAME TO files")
    assert http.get("/v1/files").status_code == 200


def test_a_rejected_large_body_is_not_read_and_closes_the_connection(server: ServerProcess) -> None:
    """Each route gets a request with a declared length of 1 GiB and no key, and responds before any of it is sent."""
    for path, error_type in (
        ("/v1/files", "authentication_error"),
        ("/v1/jobs", "authentication_error"),
        ("/v1/jobs/x/cancel", "authentication_error"),
        ("/nothing", "not_found_error"),
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {1 << 30}\r\n"
            head += "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
            connection.sendall(head.encode())
            response = b""
            while chunk := connection.recv(65536):  # until the server closes
                response += chunk
        header, _, body = response.partition(b"\r\n\r\n")
        assert b"connection: close" in header.lower()
        assert json.loads(body)["error"]["type"] == error_type
