"""Two servers behind a real nginx with TLS and a path prefix, as in the example file; and the example for Caddy."""

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.harness.certificates import Certificate, self_signed
from tests.harness.children import start_child, stop_child
from tests.harness.deployment import ROOT
from tests.harness.ports import free_loopback_port
from tests.harness.waiting import wait_until
from tests.server.server_process import API_KEY, SPEC, ServerProcess, running_server
from zeta.client import Client
from zeta_core.contract.job.events import StatusEvent

FOLDER = ROOT / "deploy/proxy"
UPLOAD_BYTES = 4 << 20

pytestmark = pytest.mark.extended


@dataclass(frozen=True)
class Proxy:
    """A running nginx, the URL that it publishes, and the servers behind it."""

    url: str
    servers: list[ServerProcess]
    access_log: Path

    def has_used(self, server: ServerProcess) -> bool:
        """Whether nginx has sent a request to this server since `forget_requests`."""
        return f"127.0.0.1:{server.port} 200" in self.access_log.read_text()

    def forget_requests(self) -> None:
        self.access_log.write_text("")


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return self_signed(tmp_path)


@pytest.fixture
def proxy(tmp_path: Path, redis_url: str, postgres_url: str, certificate: Certificate) -> Iterator[Proxy]:
    if shutil.which("nginx") is None:
        pytest.skip("needs nginx (Debian: apt-get install nginx-light)")
    settings = {
        "ZETA_ROOT_PATH": "/zeta",
        "ZETA_TRUSTED_PROXIES": "127.0.0.1",
        "ZETA_ARTIFACTS_URL": str(tmp_path / "store"),
    }
    with ExitStack() as stack:
        homes = (tmp_path / "first", tmp_path / "second")
        servers = [stack.enter_context(running_server(home, redis_url, postgres_url, **settings)) for home in homes]
        port = free_loopback_port()
        _write_configuration(tmp_path, port, [server.port for server in servers], certificate)
        command = ["nginx", "-p", tmp_path, "-c", tmp_path / "main.conf", "-g", "daemon off;"]
        nginx = start_child(command, log_file=tmp_path / "nginx.log")
        stack.callback(stop_child, nginx, stop_signal=signal.SIGTERM)
        url = f"https://localhost:{port}/zeta"

        def answers() -> bool:
            assert nginx.poll() is None, (tmp_path / "nginx.log").read_text()
            try:
                return httpx.get(f"{url}/healthz", verify=certificate.trust()).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(answers, 30, "nginx to answer")
        yield Proxy(url, servers, tmp_path / "access.log")


def _write_configuration(folder: Path, port: int, servers: list[int], certificate: Certificate) -> None:
    """The example with addresses of this test, and a main file that includes it."""
    text = (FOLDER / "nginx.conf").read_text()
    values = {
        "127.0.0.1:8400": f"127.0.0.1:{servers[0]}",
        "127.0.0.1:8401": f"127.0.0.1:{servers[1]}",
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "train.example.org": "localhost",
        "/etc/ssl/train.pem": str(certificate.certificate),
        "/etc/ssl/train.key": str(certificate.key),
    }
    for example, value in values.items():
        assert example in text, example
        text = text.replace(example, value)
    (folder / "zeta.conf").write_text(text)
    temporary = "".join(
        f"    {kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    log = f"    log_format upstream '$upstream_addr $upstream_status';\n    access_log {folder}/access.log upstream;\n"
    main = f"events {{}}\nhttp {{\n{log}{temporary}    include {folder}/zeta.conf;\n}}\n"
    (folder / "main.conf").write_text(f"pid {folder}/nginx.pid;\nerror_log stderr;\n{main}")


def test_two_servers_serve_one_url_and_either_may_be_killed(
    proxy: Proxy, certificate: Certificate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.certificate))
    data = tmp_path / "data.txt"
    data.write_bytes(b"a line of text\n" * (UPLOAD_BYTES // 15))
    with Client(proxy.url, API_KEY) as client:
        assert client.upload(data).bytes == data.stat().st_size
        job = client.submit(SPEC)
        first, second = proxy.servers
        events = client.events(job.id, timeout_seconds=60)
        assert next(iter(events)).type == "status", "the first event arrives while the stream is open"
        first.end(signal.SIGKILL)
        assert {client.job(job.id).id for _ in range(10)} == {job.id}
        first.start()
        proxy.forget_requests()
        wait_until(lambda: client.job(job.id) and proxy.has_used(first), 10, "nginx to use the first server again")
        second.end(signal.SIGTERM)
        client.cancel(job.id)
        statuses = [event for event in client.events(job.id, timeout_seconds=60) if isinstance(event, StatusEvent)]
        assert statuses[-1].status == "cancelled"
        second.start()


def test_every_url_of_the_dashboard_contains_the_prefix(proxy: Proxy, certificate: Certificate) -> None:
    with httpx.Client(verify=certificate.trust(), follow_redirects=True) as browser:
        page = browser.get(f"{proxy.url}/", headers={"Accept": "text/html"})
        assert page.status_code == 200
        urls = re.findall(r'(?:href|src|action)="(/[^"]*)"', page.text)
        assert urls
        assert all(url.startswith("/zeta/") for url in urls), urls
        origin = proxy.url.removesuffix("/zeta")
        files = [url for url in urls if re.search(r"\.(css|js)\b", url)]
        assert {browser.get(origin + url).status_code for url in files} == {200}, urls


def test_the_example_for_caddy_is_valid(tmp_path: Path) -> None:
    caddy = shutil.which("caddy")
    if caddy is None:
        pytest.skip("needs caddy (Debian: apt-get install caddy)")
    command = [caddy, "validate", "--adapter", "caddyfile", "--config", str(FOLDER / "Caddyfile")]
    environment = {"PATH": "/usr/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
