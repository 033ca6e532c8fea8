"""Responses of gateways, proxies and other programs instead of the server, and TLS failures."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.certificates import Certificate, self_signed
from tests.harness.gateways import Gateway, GatewayResponse
from tests.harness.ports import free_loopback_port
from zeta.certificates import first_certificate
from zeta.cli.exit_status import ExitStatus
from zeta.cli.failures import exit_status_of_error
from zeta.client import Client
from zeta.http_proxy import choose_proxy
from zeta.transport import HttpTransport
from zeta_core.contract.errors import ErrorBody, ErrorContent, InvalidSettings, NotFound, ZetaError
from zeta_core.contract.identifiers import ID_CHARACTERS
from zeta_core.contract.job.responses import Health

JOB_ID = f"job_{'0' * ID_CHARACTERS}"
HEALTH = GatewayResponse(
    200, Health(status="ok", version="1").model_dump_json().encode(), {"Content-Type": "application/json"}
)
NGINX_PLAIN = b"<center>The plain HTTP request was sent to HTTPS port</center>"


def always(response: GatewayResponse) -> Callable[[str, str], GatewayResponse]:
    return lambda _method, _path: response


def failure(client: Client) -> ZetaError:
    with client, pytest.raises(ZetaError) as caught:
        client.cancel(JOB_ID)  # a POST, which is not retried
    return caught.value


def failure_behind(gateway: Gateway, path: str = "") -> ZetaError:
    return failure(Client(f"{gateway.url}{path}", "key", patience_seconds=0))


@pytest.mark.parametrize(
    ("response", "code", "exit_status", "parts"),
    [
        (GatewayResponse(413), "refused_by_gateway", ExitStatus.FAILED, ["nginx", "HTTP 413", "client_max_body_size"]),
        (GatewayResponse(401), "unreachable", ExitStatus.UNREACHABLE, ["nginx", "HTTP 401", "denies access"]),
        (GatewayResponse(403), "unreachable", ExitStatus.UNREACHABLE, ["nginx", "HTTP 403", "denies access"]),
        (GatewayResponse(407), "unreachable", ExitStatus.UNREACHABLE, ["HTTP 407", "user and password"]),
        (GatewayResponse(404), "unreachable", ExitStatus.UNREACHABLE, ["not a Zeta server", "HTTP 404", "ZETA_URL"]),
        (
            GatewayResponse(400, NGINX_PLAIN),
            "unreachable",
            ExitStatus.UNREACHABLE,
            ["requires TLS", "https://127.0.0.1"],
        ),
        (GatewayResponse(429), "unreachable", ExitStatus.UNREACHABLE, ["rate"]),
        (
            GatewayResponse(502),
            "unreachable",
            ExitStatus.UNREACHABLE,
            ["nginx", "the server behind it does not", "HTTP 502"],
        ),
        (GatewayResponse(504), "unreachable", ExitStatus.UNREACHABLE, ["HTTP 504"]),
        (GatewayResponse(522), "unreachable", ExitStatus.UNREACHABLE, ["HTTP 522"]),
        (GatewayResponse(500), "internal_error", ExitStatus.FAILED, ["HTTP 500"]),
        (GatewayResponse(200), "unreachable", ExitStatus.UNREACHABLE, ["web page", "sign-in"]),
    ],
)
def test_a_response_of_a_gateway_is_reported_as_such(
    response: GatewayResponse, code: str, exit_status: ExitStatus, parts: list[str]
) -> None:
    with Gateway(respond=always(response)).running() as gateway:
        error = failure_behind(gateway)
    assert (error.code, exit_status_of_error(error)) == (code, exit_status), error.message
    for part in parts:
        assert part in error.message


@pytest.mark.parametrize("body", [b"[]", b"{}", b"", b"not JSON", b'{"id": 1, "status": "ok"}'])
@pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
def test_a_successful_response_of_another_program_is_reported(body: bytes, content_type: str) -> None:
    with Gateway(respond=always(GatewayResponse(200, body, {"Content-Type": content_type}))).running() as gateway:
        error = failure_behind(gateway)
        with Client(gateway.url, "key", patience_seconds=0) as client, pytest.raises(ZetaError) as caught:
            list(client.jobs())
    for each in (error, caught.value):
        assert "not a Zeta server (HTTP 200 OK" in each.message
        assert exit_status_of_error(each) == ExitStatus.UNREACHABLE


@pytest.mark.parametrize("path", ["/v1", "/v1/jobs", "/docs"])
def test_an_unknown_path_of_the_server_is_reported_with_the_right_url(path: str) -> None:
    missing = ErrorContent(message="Not found.", type=NotFound.type, code="route_not_found")
    response = GatewayResponse(
        404, ErrorBody(error=missing).model_dump_json().encode(), {"Content-Type": "application/json"}
    )
    with Gateway(respond=always(response)).running() as gateway:
        error = failure_behind(gateway, path)
    assert f"has nothing under the path {path}; set ZETA_URL to {gateway.url}." in error.message
    assert exit_status_of_error(error) == ExitStatus.UNREACHABLE


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 408, 414, 431, 451])
def test_one_refused_request_is_distinguished_from_an_unreachable_server(status: int) -> None:
    def refuse(_method: str, path: str) -> GatewayResponse:
        return HEALTH if path == "/zeta/healthz" else GatewayResponse(status, b"no", {})

    with Gateway(respond=refuse).running() as gateway:
        error = failure_behind(gateway, "/zeta")
    assert (error.code, exit_status_of_error(error)) == ("refused_by_gateway", ExitStatus.FAILED)
    assert f"POST /zeta/v1/jobs/{JOB_ID}/cancel" in error.message
    assert f"HTTP {status}" in error.message


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    ("location", "named"),
    [
        ("https://box.corp{path}", "set ZETA_URL to https://box.corp."),
        ("https://box.corp/zeta{path}?x=1", "set ZETA_URL to https://box.corp/zeta."),
        ("https://sso.corp/login?next=secret", "to https://sso.corp/login, which looks like a sign-in"),
        ("/login", "/login, which looks like a sign-in"),
        ("{path}/", "which looks like a sign-in or error page"),
        ("http://box:port{path}", "invalid address"),
        ("http://xn--a.corp{path}", "invalid address"),
    ],
)
def test_a_redirect_names_its_target_and_is_never_followed(status: int, location: str, named: str) -> None:
    def redirect(_method: str, path: str) -> GatewayResponse:
        return GatewayResponse(status, b"", {"Location": location.format(path=path)})

    with Gateway(respond=redirect).running() as gateway:
        error = failure_behind(gateway)
        assert len(gateway.requests) == 1
    assert exit_status_of_error(error) == ExitStatus.UNREACHABLE
    assert named in error.message
    assert "secret" not in error.message


def test_a_refusal_by_a_proxy_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    with Gateway(respond=always(GatewayResponse(403))).running() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", "")
        error = failure(Client("http://train-box:8400", "key", patience_seconds=0))
        assert proxy.requests[0].startswith("POST http://train-box:8400/")
    assert f"{proxy.url} (HTTP_PROXY)" in error.message
    assert exit_status_of_error(error) == ExitStatus.UNREACHABLE


def test_an_unresponsive_proxy_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"http://me:hunter2@127.0.0.1:{free_loopback_port()}")
    error = failure(Client("https://train-box:8400", "key", patience_seconds=0))
    assert "https_proxy" in error.message
    assert "train-box to NO_PROXY" in error.message
    assert "hunter2" not in error.message
    assert exit_status_of_error(error) == ExitStatus.UNREACHABLE


def test_a_proxy_that_refuses_to_connect_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with Gateway(program="squid", respond=always(GatewayResponse(407))).running() as proxy:
        variables = {"ALL_PROXY": proxy.url}
        assert choose_proxy("https://train-box", variables) is not None
        transport = HttpTransport("https://train-box", "key", patience_seconds=0, variables=variables)
        with contextlib.closing(transport), pytest.raises(ZetaError) as caught:
            transport.request("GET", "/v1/jobs")
    assert "ALL_PROXY" in caught.value.message
    assert "password" in caught.value.message


def test_invalid_text_and_a_closed_client_raise_errors_of_the_contract() -> None:
    client = Client("http://127.0.0.1:1", "key", patience_seconds=0)
    for key in ("two\nlines", "schlüssel", "a\0b"):
        with pytest.raises(ZetaError, match="idempotency_key"):
            client.submit({}, idempotency_key=key)
    with pytest.raises(ZetaError):
        client.jobs(entity_name="\udcff")
    client.close()
    with pytest.raises(ZetaError, match="closed"):
        client.jobs()
    for api_key in ("two\nlines", "schlüssel", "a\0b", "a b"):
        with pytest.raises(ZetaError, match="ZETA_API_KEY"):
            Client("http://127.0.0.1:1", api_key)
    Client("http://127.0.0.1:1", " key\r\n").close()


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return self_signed(tmp_path_factory.mktemp("tls"), "DNS:localhost")


@pytest.fixture
def tls_port(certificate: Certificate) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    with Gateway(respond=always(GatewayResponse(413)), tls=context).running() as gateway:
        yield gateway.port


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_a_custom_authority_is_trusted_on_localhost_too(
    tls_port: int, certificate: Certificate, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    url = f"https://localhost:{tls_port}"
    untrusted = failure(Client(url, "key"))
    assert "SSL_CERT_FILE" in untrusted.message
    assert "self-signed" in untrusted.message
    assert exit_status_of_error(untrusted) == ExitStatus.UNREACHABLE
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):  # set on some machines, and used first
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(certificate.certificate))
    assert "HTTP 413" in failure(Client(url, "key")).message
    wrong_name = failure(Client(f"https://127.0.0.1:{tls_port}", "key"))
    assert "another name" in wrong_name.message
    assert "ZETA_URL" in wrong_name.message


def test_a_given_certificate_is_trusted_for_every_name_and_no_other_is(
    tls_port: int, certificate: Certificate, tmp_path: Path
) -> None:
    combined = tmp_path / "combined.pem"  # the key first, as some programs want it, and another certificate last
    other = self_signed(tmp_path, "DNS:localhost")
    files = (certificate.key, certificate.certificate, other.certificate)
    combined.write_text("".join(file.read_text() for file in files))
    url = f"https://127.0.0.1:{tls_port}"
    assert "HTTP 413" in failure(Client(url, "key", certificate=first_certificate(combined))).message
    refused = failure(Client(url, "key", certificate=first_certificate(other.certificate)))
    assert "not signed by an authority" in refused.message
    with pytest.raises(InvalidSettings, match="contains no certificate"):
        first_certificate(certificate.key)


def test_a_wrong_scheme_is_recognized() -> None:
    with Gateway(respond=always(GatewayResponse(413))).running() as plain:
        error = failure(Client(f"https://127.0.0.1:{plain.port}", patience_seconds=0))
    assert f"set ZETA_URL to http://127.0.0.1:{plain.port}." in error.message


def test_a_program_without_http_is_reported_with_the_setting() -> None:
    def greet() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=greet)
        thread.start()
        error = failure(Client(f"http://127.0.0.1:{listener.getsockname()[1]}", patience_seconds=0))
        thread.join()
    assert exit_status_of_error(error) == ExitStatus.UNREACHABLE
    assert "ZETA_URL" in error.message


def test_invalid_certificate_settings_do_not_matter_without_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/missing.pem")
    with Gateway(respond=always(GatewayResponse(413))).running() as gateway:
        assert "HTTP 413" in failure_behind(gateway).message
    with pytest.raises(ZetaError, match=r"SSL_CERT_FILE is '/missing\.pem'"):
        Client("https://localhost:8400", "key")
