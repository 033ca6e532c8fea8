"""Requests that change the same thing at the same time: one of them succeeds, and the others get a conflict."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.harness.openai_client import openai_client
from tests.server.server_process import API_KEY, SPEC, ServerProcess, running_server

ROUNDS = 8
LARGE = b'{"text": "a"}\n' * 400_000  # 5.6 MB, so that the other request arrives while it is copied


@pytest.fixture
def server(redis_url: str, database_url: str | None, tmp_path: Path) -> Iterator[ServerProcess]:
    with running_server(tmp_path, redis_url, database_url) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with openai_client(server.url, API_KEY) as client:
        yield client


def at_once(*requests: Callable[[], Any]) -> list[Any]:
    """The results of requests that are sent at the same time; an exception is a result."""
    barrier = Barrier(len(requests))

    def send(request: Callable[[], Any]) -> Any:
        barrier.wait()
        try:
            return request()
        except Exception as error:  # noqa: BLE001 - the test checks every exception
            return error

    with ThreadPoolExecutor(len(requests)) as executor:
        return list(executor.map(send, requests))


@pytest.mark.extended
def test_a_model_name_that_is_added_twice_at_once_exists_once(server: ServerProcess) -> None:
    def add(name: str) -> int:
        with server.http() as http:
            return http.post("/v1/models", json={"name": name, "model": SPEC["model"]}).status_code

    for number in range(ROUNDS):
        statuses = at_once(*(lambda: add(f"model-{number}") for _ in range(4)))  # noqa: B023 - called in this round
        assert sorted(statuses) == [201, 409, 409, 409]


@pytest.mark.extended
def test_an_upload_is_either_completed_or_cancelled(server: ServerProcess, client: OpenAI) -> None:
    outcomes: set[str] = set()
    for _ in range(ROUNDS):
        upload = client.uploads.create(
            bytes=len(LARGE), filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune"
        )
        part = client.uploads.parts.create(upload.id, data=LARGE)
        results = at_once(
            lambda: client.uploads.complete(upload.id, part_ids=[part.id]),  # noqa: B023 - called in this round
            lambda: client.uploads.cancel(upload.id),  # noqa: B023
        )
        conflicts = [result for result in results if isinstance(result, openai.ConflictError)]
        ended = [result.status for result in results if not isinstance(result, Exception)]
        assert (len(conflicts), len(ended)) == (1, 1), results
        outcomes.update(ended)
        assert not (server.settings.artifacts / "uploads" / upload.id).exists()
    assert "cancelled" in outcomes, "no upload was cancelled while it was completed"
