"""A batch runs on a worker: it answers like a chat, and continues after a pause and after ``kill -9``."""

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.end_to_end.chat_jobs import CONTEXT, QUESTION, chat_job, run
from tests.end_to_end.specs import TINY_LLAMA, tiny_job
from tests.harness.openai_client import openai_client, strictly
from tests.harness.service import Service, processes_of_job, running_service, wait_for_end
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
BATCH: Any = "batch"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("batches")) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    with openai_client(service.url, service.api_key, timeout=120) as client:
        yield client


def create(client: OpenAI, endpoint: Any, bodies: list[dict[str, Any]]) -> Any:
    lines = [
        {"custom_id": f"request-{number}", "method": "POST", "url": endpoint, "body": body}
        for number, body in enumerate(bodies)
    ]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    file = strictly(client.files.create(file=("requests.jsonl", content), purpose=BATCH))
    return strictly(client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h"))


def completed(client: OpenAI, batch_id: str) -> Any:
    def done() -> Any:
        batch = strictly(client.batches.retrieve(batch_id))
        assert batch.status not in ("failed", "cancelled"), batch.to_dict()
        return batch if batch.status == "completed" else None

    return wait_until(done, 240, "the batch to be completed")


def lines_of(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_a_batch_gives_the_answers_of_single_requests(service: Service, client: OpenAI) -> None:
    job = chat_job(service)
    alone = client.chat.completions.create(model=job, messages=QUESTION, temperature=0, max_tokens=60)
    chat: dict[str, Any] = {"model": job, "messages": QUESTION, "temperature": 0, "max_tokens": 60}
    bodies = [chat, {**chat, "max_tokens": CONTEXT + 1}, {**chat, "max_tokens": 5}]
    batch = completed(client, create(client, "/v1/chat/completions", bodies).id)
    assert batch.request_counts.to_dict() == {"total": 3, "completed": 2, "failed": 1}
    output = lines_of(client, batch.output_file_id)
    assert [line["custom_id"] for line in output] == ["request-0", "request-2"]
    answer = output[0]["response"]["body"]
    assert answer["choices"][0]["message"]["content"] == alone.choices[0].message.content
    assert answer["system_fingerprint"] == alone.system_fingerprint
    assert alone.usage is not None
    assert answer["usage"] == alone.usage.to_dict(exclude_none=True)
    [failed] = lines_of(client, batch.error_file_id)
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("request-1", 400)
    assert "context" in failed["response"]["body"]["error"]["message"]
    downloaded = service.command("download", batch.id, "-o", str(service.home / "downloaded"))
    assert downloaded.returncode == 0, downloaded.stderr
    assert (service.home / "downloaded" / "output.jsonl").read_text().count("\n") == 2


def slow_job(service: Service) -> str:
    """A succeeded job with a slow model, whose greedy continuations rarely end because it has learned nothing."""
    shape = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "max_position_embeddings": CONTEXT}
    return run(service, tiny_job(model={"config": {**TINY_LLAMA, **shape}}, max_steps=1, learning_rate=1e-9))


def test_a_batch_continues_after_a_pause_and_a_kill(service: Service, client: OpenAI, http: httpx.Client) -> None:
    job = slow_job(service)
    bodies = [
        {"model": job, "prompt": f"{number}", "temperature": 0, "max_tokens": 10 + 12 * number} for number in range(60)
    ]
    batch_id = create(client, "/v1/completions", bodies).id

    def num_done() -> int:
        counts = client.batches.retrieve(batch_id).request_counts
        return 0 if counts is None else counts.completed

    wait_until(lambda: num_done() > 3, 120, "some requests to be answered")
    http.post(f"/v1/jobs/{batch_id}/pause").raise_for_status()
    wait_until(lambda: http.get(f"/v1/jobs/{batch_id}").json()["status"] == "paused", 60, "the batch to pause")
    [checkpoint] = http.get(f"/v1/jobs/{batch_id}/checkpoints").json()["data"]
    paused_at = checkpoint["step"]
    assert 3 < paused_at < 60
    http.post(f"/v1/jobs/{batch_id}/resume").raise_for_status()
    wait_until(lambda: num_done() > paused_at, 120, "more requests to be answered")
    for process_id in processes_of_job(batch_id):
        os.kill(process_id, signal.SIGKILL)
    batch = completed(client, batch_id)
    job_object = wait_for_end(http, batch_id)
    assert len(job_object["attempts"]) == 3
    output = lines_of(client, batch.output_file_id)
    assert [line["custom_id"] for line in output] == [f"request-{number}" for number in range(60)]
    assert len({line["id"] for line in output}) == 60
    usages = [line["response"]["body"]["usage"] for line in output]
    for line, usage, number in zip(output, usages, range(60), strict=True):
        reason = line["response"]["body"]["choices"][0]["finish_reason"]
        assert usage["completion_tokens"] == 10 + 12 * number or reason == "stop"
    assert batch.request_counts.to_dict() == {"total": 60, "completed": 60, "failed": 0}
    assert batch.usage.output_tokens == sum(usage["completion_tokens"] for usage in usages)


def test_a_cancelled_batch_keeps_what_it_has_answered(service: Service, client: OpenAI, http: httpx.Client) -> None:
    job = slow_job(service)
    bodies = [
        {"model": job, "prompt": f"{number}", "temperature": 0, "max_tokens": 10 + 40 * number} for number in range(60)
    ]
    batch_id = create(client, "/v1/completions", bodies).id

    def num_done() -> int:
        counts = client.batches.retrieve(batch_id).request_counts
        return 0 if counts is None else counts.completed

    wait_until(lambda: num_done() > 3, 120, "some requests to be answered")
    client.batches.cancel(batch_id)
    assert wait_for_end(http, batch_id)["status"] == "cancelled"
    batch = strictly(client.batches.retrieve(batch_id))
    output = lines_of(client, batch.output_file_id)
    assert batch.request_counts is not None
    assert 3 < len(output) == batch.request_counts.completed < 60
    assert batch.request_counts.failed == 0
    assert [line["response"]["status_code"] for line in output] == [200] * len(output)
