"""Hundreds of hostile inputs against a real ``zeta up``: none fails the service, and none reveals a secret.

After each table of inputs: no response was a server error, no secret was in a response or in a log of the service, no
pickle was loaded, and ``/healthz`` was answered within a second meanwhile.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.hostile_files import ARCHIVES, DATA, GGUF, MODELS, TEMPLATES
from tests.end_to_end.hostile_requests import FRAMING, HEADERS, PATHS, QUERIES, SPEC, SPECS
from tests.harness.service import Service, running_service
from tests.harness.waiting import wait_until

CANARY = "canary-9f8e7d6c-in-the-environment"
PICKLED = Path("/tmp/zeta-hostile-pickle")
HEALTH_SECONDS = 1.0
ENDED = ("succeeded", "failed", "cancelled")

# A slow check makes the next ones wait. The slow tests take up to 7 minutes, and much longer on a busy machine.
pytestmark = pytest.mark.timeout(1800)


@dataclass
class Attacked:
    """The service under attack, and what was observed."""

    service: Service
    secrets: list[bytes]
    faults: list[str] = field(default_factory=list[str])
    slowest_seconds: float = 0.0

    def check(self, name: str, status: int, content: bytes) -> None:
        """Record a server error, and a secret in a response."""
        if status >= 500:
            self.faults.append(f"{name}: {status} {content[:300]!r}")
        self.faults += [f"{name}: the response contains a secret" for secret in self.secrets if secret in content]

    def send(self, name: str, method: str, path: str, **options: Any) -> httpx.Response | None:
        with self.service.http() as http:
            try:
                response = http.request(method, path, timeout=120, **options)
            except (httpx.InvalidURL, httpx.RemoteProtocolError, httpx.LocalProtocolError, UnicodeError):
                return None  # the client can't send it; `exchange` sends raw bytes
        self.check(name, response.status_code, response.content)
        return response

    def exchange(self, name: str, request: bytes) -> None:
        """Send raw bytes, and read until the server closes the connection or is silent for a moment."""
        received = b""
        with closing(socket.create_connection(("127.0.0.1", self.service.port), 10)) as connection:
            with suppress(OSError):
                connection.sendall(request)
            connection.settimeout(0.3)
            with suppress(OSError):
                while chunk := connection.recv(65536):
                    received += chunk
        for response in received.split(b"HTTP/1.1 ")[1:]:
            self.check(name, int(response[:3]), response)

    def validate(self, name: str, **fields: Any) -> None:
        self.send(name, "POST", "/v1/jobs/validate", json={**SPEC, **fields})

    def upload(self, name: str, filename: str, content: bytes, purpose: str) -> str | None:
        """The id of an uploaded file; ``None`` if it was rejected."""
        files = {"file": (filename, content)}
        response = self.send(name, "POST", "/v1/files", files=files, data={"purpose": purpose})
        return response.json()["id"] if response is not None and response.status_code == 201 else None


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    PICKLED.unlink(missing_ok=True)
    home = tmp_path_factory.mktemp("hostile") / "home"
    settings = {"ZETA_HUB": "off", "AWS_SECRET_ACCESS_KEY": CANARY, "ZETA_CHECK_SECONDS": "20"}
    with running_service(home, settings=settings) as service:
        secrets = [service.api_key.encode(), CANARY.encode()]
        secrets += [(home / name).read_text().strip().encode() for name in ("worker.secret", "redis.url")]
        secrets.append(Path("/etc/passwd").read_bytes().splitlines()[0])
        yield Attacked(service, secrets)


@pytest.fixture
def attack(attacked: Attacked) -> Iterator[Attacked]:
    """The service, observed from another thread during a test; what was observed is checked at its end."""
    ended = threading.Event()

    def observe() -> None:
        with attacked.service.http() as http:
            while not ended.wait(0.1):
                started = time.monotonic()
                with suppress(httpx.TransportError):
                    http.get("/healthz", timeout=10)
                attacked.slowest_seconds = max(attacked.slowest_seconds, time.monotonic() - started)

    observer = threading.Thread(target=observe)
    attacked.faults.clear()
    attacked.slowest_seconds = 0.0
    observer.start()
    try:
        yield attacked
    finally:
        ended.set()
        observer.join()
    for log in (attacked.service.home / "logs").iterdir():
        content = log.read_bytes()
        attacked.faults += [f"{log.name} contains a secret" for secret in attacked.secrets if secret in content]
        attacked.faults += [f"{log.name} contains a control character"] * (b"\x1b" in content)
    assert not attacked.faults, "\n".join(attacked.faults)
    assert not PICKLED.exists(), "a pickle was loaded"
    assert attacked.slowest_seconds < HEALTH_SECONDS


def test_the_tables_contain_at_least_300_inputs() -> None:
    tables = (PATHS, QUERIES, HEADERS, FRAMING, SPECS, ARCHIVES, MODELS, GGUF, TEMPLATES, DATA)
    assert sum(map(len, tables)) >= 300
    assert len(set(PATHS)) == len(PATHS)


def test_hostile_paths_and_queries(attack: Attacked) -> None:
    key = f"Authorization: Bearer {attack.service.api_key}\r\nConnection: close\r\n\r\n"
    for path in (*PATHS, *QUERIES):
        attack.exchange(path[:100], f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{key}".encode())


def test_hostile_headers(attack: Attacked) -> None:
    key = f"Authorization: Bearer {attack.service.api_key}\r\n"
    for name, header in HEADERS.items():
        own = "" if header.startswith("Authorization") else key
        host = "" if header.startswith("Host") else "Host: localhost\r\n"
        request = f"GET /v1/jobs HTTP/1.1\r\n{host}{own}{header}\r\nConnection: close\r\n\r\n"
        attack.exchange(name, request.encode("latin-1"))


def test_hostile_framing(attack: Attacked) -> None:
    key = f"Authorization: Bearer {attack.service.api_key}\r\n".encode()
    for name, request in FRAMING.items():
        attack.exchange(name, request.replace(b"{key}", key))


@pytest.mark.slow
def test_hostile_specs(attack: Attacked) -> None:
    for name, body in SPECS.items():
        attack.send(name, "POST", "/v1/jobs/validate", content=body)


@pytest.mark.slow
def test_hostile_archives_and_models(attack: Attacked) -> None:
    archives = {f"archive {name}": ("m.tar", content) for name, content in ARCHIVES.items()}
    models = {f"model {name}": ("m.tar", content) for name, content in MODELS.items()}
    ggufs = {f"GGUF {name}": ("m.gguf", content) for name, content in GGUF.items()}
    for name, (filename, content) in {**archives, **models, **ggufs}.items():
        file = attack.upload(name, filename, content, "model")
        if file is not None:
            attack.validate(name, model={"file": file}, tokenizer={"file": file})


@pytest.mark.slow
def test_hostile_data_and_templates(attack: Attacked) -> None:
    for name, (filename, content) in DATA.items():
        file = attack.upload(name, filename, content, "dataset")
        if file is not None:
            attack.validate(name, dataset={"file": file})
            attack.validate(name, dataset={"file": file}, use_pretokenized=True)
    messages = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    file = attack.upload("messages", "a.jsonl", json.dumps(messages).encode(), "dataset")
    for name, template in TEMPLATES.items():
        attack.validate(name, dataset={"file": file}, chat_template=template)


@pytest.mark.slow
def test_jobs_with_hostile_files_end_as_invalid_without_retries(attack: Attacked) -> None:
    """Every accepted file as a job: it ends at its first attempt, with a reason that blames the file."""
    data = attack.upload(
        "data", "a.jsonl", json.dumps({"text": "abab aaaa aaaaaaaaaaaaaaaaaaaaaa"}).encode(), "dataset"
    )
    specs: dict[str, dict[str, Any]] = {}
    for name, content in MODELS.items():
        if (file := attack.upload(name, "m.tar", content, "model")) is not None:
            specs[f"tokenizer {name}"] = {"tokenizer": {"file": file}, "dataset": {"file": data}}
    for name, (filename, content) in DATA.items():
        if (file := attack.upload(name, filename, content, "dataset")) is not None:
            specs[f"data {name}"] = {"dataset": {"file": file}}
    with attack.service.http() as http:
        for name, fields in specs.items():
            submitted = attack.send(name, "POST", "/v1/jobs", json={**SPEC, **fields})
            if submitted is None or submitted.status_code != 201:
                continue
            path = f"/v1/jobs/{submitted.json()['id']}"
            wait_until(lambda path=path: http.get(path).json()["status"] in ENDED, 120, f"the end of {name!r}")
            response = http.get(path)
            attack.check(name, response.status_code, response.content)
            job = response.json()
            if job["attempt"] != 1 or job["status_reason"] not in ("completed", "invalid_data", "invalid_model"):
                attack.faults.append(f"{name}: {job['status_reason']} in attempt {job['attempt']}: {job['error']}")
            log = http.get(f"{path}/logs")
            attack.check(name, log.status_code, log.content)
