"""With `ZETA_SERVE_URL`, an engine of the operator answers: its responses are passed on, and keys stay separate."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import openai
import pytest
from openai import OpenAI

from tests.harness.openai_client import openai_client
from tests.harness.valkey import ValkeyServer
from tests.server.server_process import API_KEY, ServerProcess, running_server
from zeta_core.contract.identifiers import new_id

ENGINE_KEY = "the-key-of-the-engine"
CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}


class Engine(BaseHTTPRequestHandler):
    """Answers every chat with two chunks, and records the requests. The model "slow" never answers."""

    received: ClassVar[list[dict[str, Any]]] = []
    lost_connection: ClassVar[threading.Event] = threading.Event()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append({"path": self.path, "key": self.headers["Authorization"], "body": body})
        if body["model"] == "slow":
            assert self.rfile.read(1) == b"", "the connection was closed"
            self.lost_connection.set()
            return
        if body["model"] == "unknown":
            self.send_response(404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "no such model", "type": "x", "param": null, "code": null}}')
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for text in ("Hel", "lo"):
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
            self.wfile.write(f"data: {json.dumps({**CHUNK, 'choices': [choice]})}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/v1"
        listening.shutdown()


@pytest.fixture(scope="module")
def server(
    engine: str, shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    settings = {"ZETA_SERVE_URL": engine, "ZETA_SERVE_API_KEY": ENGINE_KEY}
    with running_server(tmp_path_factory.mktemp("server"), shared_valkey.second_url, **settings) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    Engine.received.clear()
    with openai_client(server.url, API_KEY) as client:
        yield client


def test_a_stream_of_the_engine_is_passed_on(client: OpenAI) -> None:
    chunks = client.chat.completions.create(
        model="some/model", messages=[{"role": "user", "content": "Hi"}], stream=True, extra_body={"top_k": 5}
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello"
    [request] = Engine.received
    assert (request["path"], request["key"]) == ("/v1/chat/completions", f"Bearer {ENGINE_KEY}")
    assert request["body"]["top_k"] == 5


def test_an_error_of_the_engine_is_passed_on(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.completions.create(model="unknown", prompt="Hi")


def test_a_job_that_does_not_exist_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=new_id("job"), prompt="Hi")
    assert Engine.received == []


def test_the_engine_stops_when_the_client_disconnects(client: OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5, max_retries=0).completions.create(model="slow", prompt="Hi")
    assert Engine.lost_connection.wait(10)


@pytest.mark.extended
def test_an_engine_that_is_silent_for_too_long_is_given_up(engine: str, redis_url: str, tmp_path: Path) -> None:
    with (
        running_server(tmp_path, redis_url, ZETA_SERVE_URL=engine, ZETA_SERVE_SECONDS="0.5") as server,
        openai_client(server.url, API_KEY) as client,
        pytest.raises(openai.InternalServerError, match="did not respond within") as caught,
    ):
        client.completions.create(model="slow", prompt="Hi")
    assert caught.value.status_code == 503


@pytest.mark.extended
def test_an_engine_that_cannot_be_reached_is_unavailable(redis_url: str, tmp_path: Path) -> None:
    with (
        running_server(tmp_path, redis_url, ZETA_SERVE_URL="http://127.0.0.1:9/v1") as server,
        openai_client(server.url, API_KEY) as client,
        pytest.raises(openai.InternalServerError, match="can't be reached") as caught,
    ):
        client.completions.create(model="m", prompt="Hi")
    assert caught.value.status_code == 503
