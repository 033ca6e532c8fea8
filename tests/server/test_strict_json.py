"""The client parses a JSON spec as strictly as the server parses a request body."""

import json
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.harness.service import ZETA, clean_environment
from tests.server.server_process import API_KEY, SPEC, ServerProcess, error_of
from zeta.spec_file import read_spec
from zeta_core.contract.errors import InvalidRequest

VALID = json.dumps(SPEC)


def with_field(text: str) -> bytes:
    """The spec with one more field, as UTF-8."""
    return f"{VALID[:-1]}, {text}}}".encode()


def nested(levels: int) -> bytes:
    """A spec whose objects and lists are nested ``levels`` deep: the spec, the model, its config and lists."""
    model = {"config": {"model_type": "llama", "x": "LISTS"}}
    lists = "[" * (levels - 3) + "1" + "]" * (levels - 3)
    return json.dumps({**SPEC, "model": model}).replace('"LISTS"', lists).encode()


REJECTED = [
    (
        400,
        b'{"seed": 1,\n nope}',
        "is not valid JSON: Expecting property name enclosed in double quotes in line 2, column 2",
    ),
    (400, with_field('"seed": 1} {"seed": 2'), "is not valid JSON: Extra data"),
    (400, with_field('"learning_rate": NaN'), "NaN is not a valid JSON number"),
    (400, with_field('"learning_rate": -Infinity'), "-Infinity is not a valid JSON number"),
    (422, with_field('"learning_rate": 1e999'), "learning_rate is too large"),
    (400, with_field('"seed": ' + "9" * 401), "an integer of 401 digits is too large"),
    (422, with_field('"lora": {"r": 1, "\\u0072": 1}'), "contains 'r' twice in one object"),
    (422, with_field('"metadata": {"a\\u001b": "", "a\\u001b": ""}'), "A name contains the control character U+001B"),
    (400, nested(101), "is nested more than 100 levels deep"),
    (400, nested(25_000), "is nested more than 100 levels deep"),
    (422, with_field('"metadata": {"note": "\\u001b[2J"}'), "metadata.note contains the control character U+001B"),
    (422, with_field('"metadata": {"note": "a\u202eb"}'), "metadata.note contains the control character U+202E"),
    (422, with_field('"metadata": {"a\\nb": "x"}'), "metadata.(name) contains the control character U+000A"),
    (422, with_field('"entity_name": "\\udc80"'), "entity_name contains the lone surrogate U+DC80"),
    (422, with_field('"tags": ["x", "a\\u0000"]'), "tags.1 contains the control character U+0000"),
    (400, VALID.encode("utf-16"), "is UTF-16 or UTF-32 text; encode it as UTF-8"),
    (400, VALID.encode("utf-16-le"), "is UTF-16 or UTF-32 text; encode it as UTF-8"),
    (400, VALID.encode("utf-32-be"), "is UTF-16 or UTF-32 text; encode it as UTF-8"),
    (
        400,
        with_field('"entity_name": "caf\u00e9"').decode().encode("latin-1"),
        "is not UTF-8 text (byte 0xe9 in line 1)",
    ),
]


@pytest.mark.parametrize(("status", "content", "reason"), REJECTED)
def test_server_and_client_reject_the_same_json(
    http: httpx.Client, tmp_path: Path, status: int, content: bytes, reason: str
) -> None:
    response = http.post("/v1/jobs/validate", content=content)
    assert response.status_code == status
    error = error_of(response)
    assert reason in error["message"]
    file = tmp_path / "job.json"
    file.write_bytes(content)
    with pytest.raises(InvalidRequest) as rejected:
        read_spec(file)
    in_body = error["message"].startswith("The request body ")
    sentence = (
        f"{file} {error['message'].removeprefix('The request body ')}" if in_body else f"{file}: {error['message']}"
    )
    assert rejected.value.message.removeprefix("The spec ") == sentence
    assert rejected.value.param == error["param"]


@pytest.mark.parametrize("content", [REJECTED[0][1], with_field('"tags": ["a\\u0000"]'), VALID.encode("utf-16")])
def test_the_command_line_prints_the_servers_error(
    server: ServerProcess, http: httpx.Client, tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "job.json"
    file.write_bytes(content)
    environment = {**clean_environment(), "HOME": str(tmp_path), "ZETA_URL": server.url, "ZETA_API_KEY": API_KEY}
    done = subprocess.run(
        [ZETA, "validate", str(file)], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    message = error_of(http.post("/v1/jobs/validate", content=content))["message"]
    assert " ".join(done.stderr.split()).endswith(message.removeprefix("The request body "))


@pytest.mark.parametrize(
    "content",
    [
        VALID.encode(),
        f"\r\n\t{VALID}\n".encode(),
        b"\xef\xbb\xbf" + VALID.encode(),
        with_field('"seed": 2147483647'),
        with_field('"metadata": {"note": "two\\r\\n\\tlines \\ud83d\\ude00 \u65e5\u672c"}'),
        nested(20),
    ],
)
def test_server_and_client_accept_the_same_json(http: httpx.Client, tmp_path: Path, content: bytes) -> None:
    response = http.post("/v1/jobs", content=content)
    assert response.status_code == 201, response.text
    file = tmp_path / "job.json"
    file.write_bytes(content)
    spec = read_spec(file)
    assert spec == json.loads(content)
    assert {name: response.json()["spec"][name] for name in spec} == spec
