"""Browsers: foreign names on loopback, security headers, CORS; and TLS for addresses that other machines reach."""

import socket
from pathlib import Path

import httpx
import pytest

from tests.harness.certificates import self_signed
from tests.harness.forked_server import ForkedServer
from tests.harness.service import clean_environment
from tests.harness.valkey import ValkeyServer
from tests.server.server_process import API_KEY, ServerProcess, error_of, running_server

ORIGIN = "https://lab.example.org"


def send(server: ServerProcess, request: bytes) -> bytes:
    """The response to raw bytes."""
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8:1", "localhost:99", "LOCALHOST", "a.localhost", "[::1]:80"])
def test_names_of_this_machine_are_accepted(http: httpx.Client, host: str) -> None:
    assert http.get("/v1/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8400",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "10.0.0.1",
        "[::2]",
        "",
        "a:b:c",
    ],
)
def test_a_foreign_name_on_loopback_is_rejected(http: httpx.Client, host: str) -> None:
    response = http.get("/healthz", headers={"Host": host})
    assert (response.status_code, error_of(response)["code"]) == (400, "unknown_host")
    assert "ZETA_BEHIND_PROXY" in error_of(response)["message"]


@pytest.mark.parametrize("hosts", [b"", b"Host: localhost\r\nHost: localhost\r\n"])
def test_a_request_without_exactly_one_host_is_rejected(server: ServerProcess, hosts: bytes) -> None:
    response = send(server, b"GET /healthz HTTP/1.1\r\n" + hosts + b"Connection: close\r\n\r\n")
    assert response.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"invalid_host"' in response


def test_http_1_0_needs_no_host(server: ServerProcess) -> None:
    assert send(server, b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_every_response_has_the_security_headers(server: ServerProcess, http: httpx.Client) -> None:
    responses = [http.get(path) for path in ("/healthz", "/v1/jobs", "/v1/jobs/none", "/openapi.json", "/")]
    responses.append(httpx.get(f"{server.url}/v1/jobs"))
    for response in responses:
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        # With no-referrer, a browser would not name the origin of a page's forms, which the dashboard checks.
        is_page = response.url.path == "/"
        assert response.headers["referrer-policy"] == ("same-origin" if is_page else "no-referrer")
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        assert "access-control-allow-origin" not in response.headers
    assert b"x-content-type-options: nosniff" in send(server, b"no HTTP\r\n\r\n")


def test_cors_is_closed_by_default(http: httpx.Client) -> None:
    response = http.get("/v1/jobs", headers={"Origin": ORIGIN})
    assert "access-control-allow-origin" not in response.headers
    preflight = http.options("/v1/jobs", headers={"Origin": ORIGIN, "Access-Control-Request-Method": "GET"})
    assert preflight.status_code == 405


@pytest.mark.extended
def test_pages_of_a_listed_origin_may_use_a_server_behind_a_proxy(own_valkey: ValkeyServer, tmp_path: Path) -> None:
    settings = {"ZETA_CORS_ORIGINS": f"http://localhost:3000, {ORIGIN}", "ZETA_BEHIND_PROXY": "yes"}
    with running_server(tmp_path / "home", own_valkey.url, **settings) as server, server.http() as http:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        preflight = http.options("/v1/jobs", headers={"Origin": ORIGIN, **asked})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        assert "access-control-allow-credentials" not in preflight.headers
        assert http.get("/v1/jobs", headers={"Origin": ORIGIN}).headers["access-control-allow-origin"] == ORIGIN
        other = http.get("/v1/jobs", headers={"Origin": "https://lab.example.org.evil.example"})
        assert "access-control-allow-origin" not in other.headers
        assert http.get("/healthz", headers={"Host": "train.example.org"}).status_code == 200


def refusal(tmp_path: Path, **settings: str) -> str:
    """Start a server that refuses to start, and return its output."""
    variables = {"ZETA_HOME": str(tmp_path), "ZETA_WORKER_SECRET": "s" * 40, "ZETA_API_KEY": API_KEY, "ZETA_PORT": "0"}
    log_file = tmp_path / "server.log"
    assert ForkedServer({**clean_environment(), **variables, **settings}, log_file).wait(60) == 2
    return log_file.read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ZETA_HOST": "0.0.0.0"}, "ZETA_HOST is '0.0.0.0', which other machines reach"),
        ({"ZETA_HOST": "::"}, "set ZETA_TLS_CERT and ZETA_TLS_KEY, or ZETA_BEHIND_PROXY=yes"),
        ({"ZETA_TLS_CERT": "/none.pem"}, "ZETA_TLS_CERT is set without ZETA_TLS_KEY"),
        ({"ZETA_TLS_CERT": "/none.pem", "ZETA_TLS_KEY": "/none.key"}, "can't be used (No such file or directory)"),
        ({"ZETA_CORS_ORIGINS": "*"}, "'*' is not an origin such as https://train.example.org"),
        ({"ZETA_CORS_ORIGINS": "https://a.example/path"}, "is not an origin"),
    ],
)
def test_an_unsafe_or_unusable_address_is_refused(settings: dict[str, str], message: str, tmp_path: Path) -> None:
    output = refusal(tmp_path, **settings)
    assert message in output
    assert len(output.splitlines()) == 1


@pytest.mark.extended
def test_a_server_with_a_certificate_speaks_https_only(own_valkey: ValkeyServer, tmp_path: Path) -> None:
    pair = self_signed(tmp_path)
    settings = {"ZETA_TLS_CERT": str(pair.certificate), "ZETA_TLS_KEY": str(pair.key)}
    with running_server(tmp_path / "home", own_valkey.url, **settings) as server:
        trusted = pair.trust()
        headers = {"Authorization": f"Bearer {API_KEY}"}
        response = httpx.get(f"https://localhost:{server.port}/v1/jobs", verify=trusted, headers=headers)
        assert response.status_code == 200
        assert response.headers["strict-transport-security"] == "max-age=31536000"
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://localhost:{server.port}/healthz")
