"""Raw connections: HTTP/1.0, invalid HTTP, endless request heads, and all framings of bodies."""

import json
import socket
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from server.http.connections import RESERVED_FILES
from server.http.protocol import WRITE_SECONDS
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.rows import Rows
from tests.server.server_process import API_KEY, SPEC, ServerProcess, error_of
from zeta_core.contract.job.status import JobStatus

KEY = f"Authorization: Bearer {API_KEY}\r\n"


def exchange(server: ServerProcess, request: bytes) -> tuple[bytes, dict[str, str], bytes]:
    """Send raw bytes; returns the status line, the headers and the body up to the connection's end."""
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=30)) as connection:
        connection.sendall(request)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    return (
        status.encode(),
        {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)},
        body,
    )


def get_http_1_0(server: ServerProcess, path: str, headers: str = "") -> tuple[bytes, dict[str, str], bytes]:
    return exchange(server, f"GET {path} HTTP/1.0\r\nHost: localhost\r\n{KEY}{headers}\r\n".encode())


@pytest.fixture(scope="module")
def job_id(rows: Rows) -> str:
    made = rows.job()
    rows.attempt(made, log="one\ntwo\n", to=JobStatus.SUCCEEDED)
    return made


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/logs", ""),
        ("/logs?follow=true", ""),
        ("/logs?tail=0&follow=true", "Connection: keep-alive\r\n"),
        ("/events", "Accept: text/event-stream\r\n"),
        ("/events", ""),
        ("/metrics", "Accept: text/csv\r\n"),
        ("", ""),
    ],
)
def test_responses_to_http_1_0_are_never_chunked(
    server: ServerProcess, http: httpx.Client, job_id: str, path: str, headers: str
) -> None:
    status, answered, body = get_http_1_0(server, f"/v1/jobs/{job_id}{path}", headers)
    assert status == b"HTTP/1.1 200 OK"
    assert "transfer-encoding" not in answered
    assert answered["connection"] == "close"
    modern = dict([headers.strip().split(": ", 1)]) if headers.startswith("Accept") else {}
    assert body == http.get(f"/v1/jobs/{job_id}{path}", headers=modern).content


def test_http_1_0_supports_ranges_errors_and_head(server: ServerProcess, http: httpx.Client) -> None:
    file = http.post("/v1/files", files={"file": ("a.txt", b"0123456789")}, data={"purpose": "dataset"}).json()
    status, headers, body = get_http_1_0(server, f"/v1/files/{file['id']}/content", "Range: bytes=2-4\r\n")
    assert (status, headers["content-length"], body) == (b"HTTP/1.1 206 Partial Content", "3", b"234")
    status, headers, body = get_http_1_0(server, "/v1/nothing")
    assert (status, json.loads(body)["error"]["code"]) == (b"HTTP/1.1 404 Not Found", "route_not_found")
    request = f"HEAD /v1/files/{file['id']}/content HTTP/1.0\r\n{KEY}\r\n"
    status, headers, body = exchange(server, request.encode())
    assert (status, headers["content-length"], body) == (b"HTTP/1.1 200 OK", "10", b"")
    status, _, body = exchange(server, f"HEAD /healthz HTTP/1.0\r\n{KEY}\r\n".encode())
    assert (status, body) == (b"HTTP/1.1 200 OK", b"")


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /v1/\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_invalid_http_gets_the_standard_error_shape(server: ServerProcess, request_: bytes) -> None:
    status, headers, body = exchange(server, request_)
    assert status == b"HTTP/1.1 400 Bad Request"
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"]
    assert json.loads(body)["error"]["code"] == "invalid_http"


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /v1/jobs?" + b"metadata[k]=v&" * 5_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX-Long: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: a\r\n" % i for i in range(9_000)) + b"\r\n",
    ],
)
def test_a_request_head_above_the_limit_is_rejected(server: ServerProcess, head: bytes) -> None:
    status, _, body = exchange(server, head)
    assert status.startswith(b"HTTP/1.1 431 ")
    assert json.loads(body)["error"]["code"] == "head_too_large"


@pytest.mark.parametrize("beginning", [b"GET /", b"GET / HTTP/1.1\r\nX-Long: "])
def test_an_endless_request_head_is_not_kept_in_memory(server: ServerProcess, beginning: bytes) -> None:
    before = server.peak_memory_bytes()
    sent = 0
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=30)) as connection:
        connection.sendall(beginning)
        try:
            while sent < 200 << 20:
                sent += connection.send(b"a" * 65536)
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert sent < 50 << 20
    assert server.peak_memory_bytes() - before < 32 << 20
    assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_many_headers_are_rejected_and_trailers_are_dropped(server: ServerProcess) -> None:
    head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
    assert exchange(server, head + b"a: b\r\n" * 200 + b"Connection: close\r\n\r\n")[0] == b"HTTP/1.1 200 OK"
    status, _, body = exchange(server, head + b"a: b\r\n" * 256 + b"\r\n")
    assert status.startswith(b"HTTP/1.1 431 ")
    assert b"The request has 257 headers; send at most 256." in body

    peak = server.peak_memory_bytes()
    request = b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    request += f"Authorization: Bearer {API_KEY}\r\n\r\n2\r\n{{}}\r\n0\r\n".encode()
    with suppress(ConnectionError), closing(socket.create_connection(("127.0.0.1", server.port), 30)) as connection:
        connection.sendall(request + b"a: b\r\n" * 3_000_000 + b"\r\n")
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    assert server.peak_memory_bytes() - peak < 32 << 20


def test_pipelined_requests_without_readers_are_not_kept_in_memory(server: ServerProcess) -> None:
    before = server.peak_memory_bytes()
    sent = 0
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=10)) as connection:
        try:
            while sent < 20 << 20:
                sent += connection.send(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert sent < 20 << 20
    assert server.peak_memory_bytes() - before < 32 << 20
    assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_a_new_connection_replaces_the_one_that_was_silent_longest(shared_valkey: ValkeyServer, tmp_path: Path) -> None:
    process = ServerProcess(tmp_path, shared_valkey.url)
    process.max_open_files = RESERVED_FILES + 20
    process.start()
    with ExitStack() as stack:
        stack.callback(process.end)
        silent = [
            stack.enter_context(closing(socket.create_connection(("127.0.0.1", process.port), timeout=30)))
            for _ in range(100)
        ]
        assert httpx.get(f"{process.url}/healthz").status_code == 200
        assert silent[0].recv(1) == b"", "the server closed the oldest one"
        silent[-1].sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert silent[-1].recv(100).startswith(b"HTTP/1.1 200 OK")


def test_busy_connections_are_kept_and_further_ones_get_503(shared_valkey: ValkeyServer, tmp_path: Path) -> None:
    process = ServerProcess(tmp_path, shared_valkey.url)
    process.max_open_files = RESERVED_FILES + 20
    process.start()
    with ExitStack() as stack:
        stack.callback(process.end)
        busy = [
            stack.enter_context(closing(socket.create_connection(("127.0.0.1", process.port), timeout=30)))
            for _ in range(20)
        ]
        for connection in busy:
            request = f"POST /v1/jobs/validate HTTP/1.1\r\nHost: localhost\r\n{KEY}Content-Length: 2\r\n\r\n"
            connection.sendall(request.encode())
        wait_until(lambda: httpx.get(f"{process.url}/healthz").status_code == 503, 10, "the limit")
        error = httpx.get(f"{process.url}/healthz")
        assert error_of(error)["code"] == "too_many_connections"
        assert error.headers["retry-after"]
        busy[0].sendall(b"{}")
        assert busy[0].recv(100).startswith(b"HTTP/1.1 ")
        busy[0].close()
        wait_until(lambda: httpx.get(f"{process.url}/healthz").status_code == 200, 10, "a free connection")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_client_that_reads_nothing_is_disconnected(server: ServerProcess, http: httpx.Client) -> None:
    data = {"file": ("large.txt", b"0123456789abcde\n" * (1 << 20))}
    file = http.post("/v1/files", files=data, data={"purpose": "dataset"}).json()
    request = f"GET /v1/files/{file['id']}/content HTTP/1.1\r\nHost: localhost\r\n{KEY}\r\n".encode()
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=30)) as connection:
        connection.sendall(request)
        address = connection.getsockname()

        def is_connected() -> bool:
            return any(found.raddr == address for found in psutil.Process(server.pid).net_connections("tcp4"))

        wait_until(is_connected, 10, "the connection")
        wait_until(lambda: not is_connected(), 3 * WRITE_SECONDS, "the server to close the connection")


def test_pipelined_bodies_do_not_count_as_request_heads(server: ServerProcess) -> None:
    post = (
        f"POST /v1/jobs/validate HTTP/1.1\r\nHost: localhost\r\n{KEY}Content-Length: 60000\r\n\r\n".encode()
        + b" " * 60_000
    )
    get = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    status, _, rest = exchange(server, post * 3 + get)
    assert status == b"HTTP/1.1 400 Bad Request"  # white space is not JSON
    assert rest.count(b"HTTP/1.1 400") == 2
    assert b'"status":"ok"' in rest


def test_json_bodies_are_read_chunked_and_after_100_continue(server: ServerProcess) -> None:
    body = json.dumps(SPEC).encode()
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:])) + b"0\r\n\r\n"
    head = f"POST /v1/jobs/validate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{KEY}"
    status, _, _ = exchange(server, head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunked)
    assert status == b"HTTP/1.1 200 OK"
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=30)) as connection:
        connection.sendall(f"{head}Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")


def test_a_request_is_logged_on_one_line_with_its_client(server: ServerProcess) -> None:
    path = "/v1/jobs/%1b%5B2J%0Aforged%20line?x=%1b"
    exchange(server, f"GET {path} HTTP/1.0\r\n\r\n".encode())
    wait_until(lambda: "GET /v1/jobs/%1b%5B2J%0Aforged%20line was answered" in server.log(), 10, "the line")
    assert "\x1b" not in server.log()
    assert ", for 127.0.0.1." in server.log()
