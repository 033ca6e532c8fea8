"""Hundreds of hostile inputs against a real ``zeta up``, and a server with a worker: none harms the service.

After each table of inputs: no response was a server error, no secret was in a response, a log or an artifact, no
process of the service opened a file outside its folders (where this can be observed), no pickle was loaded, and other
requests were answered within a second meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.end_to_end.attacked_service import KINDS, Attacked, attacked_service
from tests.end_to_end.hostile_files import ARCHIVES, DATA, GGUF, MODELS, PREFERENCES, TEMPLATES
from tests.end_to_end.hostile_requests import FRAMING, HEADERS, PATHS, QUERIES, SPEC, SPECS
from tests.harness.waiting import wait_until

ENDED = ("succeeded", "failed", "cancelled")

# A slow check makes the next ones wait. The slow tests take up to 7 minutes, and much longer on a busy machine.
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module", params=KINDS)
def attacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    with attacked_service(request.param, tmp_path_factory.mktemp("hostile")) as attacked:
        yield attacked


@pytest.fixture
def attack(attacked: Attacked) -> Iterator[Attacked]:
    """The service; what is observed during a test is checked at its end."""
    with attacked.watched():
        yield attacked


def test_the_tables_contain_at_least_300_inputs() -> None:
    tables = (PATHS, QUERIES, HEADERS, FRAMING, SPECS, ARCHIVES, MODELS, GGUF, TEMPLATES, DATA, PREFERENCES)
    assert sum(map(len, tables)) >= 300
    assert len(set(PATHS)) == len(PATHS)


def test_hostile_paths_and_queries(attack: Attacked) -> None:
    key = f"Authorization: Bearer {attack.target.api_key}\r\nConnection: close\r\n\r\n"
    for path in (*PATHS, *QUERIES):
        attack.exchange(path[:100], f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{key}".encode())


def test_hostile_headers(attack: Attacked) -> None:
    key = f"Authorization: Bearer {attack.target.api_key}\r\n"
    for name, header in HEADERS.items():
        own = "" if header.startswith("Authorization") else key
        host = "" if header.startswith("Host") else "Host: localhost\r\n"
        request = f"GET /v1/jobs HTTP/1.1\r\n{host}{own}{header}\r\nConnection: close\r\n\r\n"
        attack.exchange(name, request.encode("latin-1"))


def test_hostile_framing(attack: Attacked) -> None:
    key = f"Authorization: Bearer {attack.target.api_key}\r\n".encode()
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
def test_hostile_preferences(attack: Attacked) -> None:
    for name, (method, row) in PREFERENCES.items():
        file = attack.upload(name, "a.jsonl", f"{json.dumps(row)}\n".encode() * 3, "dataset")
        if file is not None:
            attack.validate(name, dataset={"file": file}, method=method)


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
    with attack.target.http() as http:
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
