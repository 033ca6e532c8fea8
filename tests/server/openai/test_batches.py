"""Batches under ``/openai/v1`` with the official client, on a server without workers."""

import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.harness.openai_client import strictly
from tests.harness.service import ZETA, clean_environment
from tests.server.openai.conftest import BASE_MODEL
from tests.server.openai.data import upload
from tests.server.rows import Rows
from tests.server.server_process import API_KEY, ServerProcess
from zeta_core.contract.job.status import JobStatus, StatusReason

URL: Any = "/v1/chat/completions"


def line(number: int, model: str, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": f"Number {number}?"}], "max_tokens": 5}
    return {"custom_id": f"request-{number}", "method": "POST", "url": URL, "body": body, **fields}


def upload_batch(client: OpenAI, *lines: dict[str, Any], purpose: Any = "batch") -> str:
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    return client.files.create(file=("requests.jsonl", content), purpose=purpose).id


@pytest.fixture
def model(rows: Rows) -> str:
    """The name of a trained model."""
    job_id = rows.job()
    rows.attempt(job_id, to=JobStatus.SUCCEEDED)
    rows.checkpoint(job_id, "final", 4, {"model.safetensors": ("weights", b"weights")})
    return job_id


def create(client: OpenAI, model: str, number: int = 3, **fields: Any) -> Any:
    file_id = upload_batch(client, *(line(each, model) for each in range(number)))
    return client.batches.create(input_file_id=file_id, endpoint=URL, completion_window="24h", **fields)


def test_a_batch_is_created_read_listed_and_cancelled(client: OpenAI, http: httpx.Client, model: str) -> None:
    batch = strictly(create(client, model, metadata={"team": "a"}))
    assert (batch.status, batch.endpoint, batch.completion_window) == ("validating", URL, "24h")
    assert (batch.metadata, batch.model, batch.output_file_id, batch.errors) == ({"team": "a"}, model, None, None)
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 3, "completed": 0, "failed": 0}
    job = http.get(f"/v1/jobs/{batch.id}").json()
    assert (job["kind"], job["spec"]["model"]) == ("batch", {"job": model, "checkpoint": "final"})
    assert strictly(client.files.retrieve(batch.input_file_id)).purpose == "batch"

    second = create(client, model)
    page = client.batches.list(limit=1)
    assert ([each.id for each in page.data], page.has_more) == ([second.id], True)
    assert [strictly(each).id for each in client.batches.list(limit=1)][:2] == [second.id, batch.id]
    cancelled = strictly(client.batches.cancel(batch.id))
    assert cancelled.status == "cancelled"
    assert cancelled.cancelled_at is not None
    assert strictly(client.batches.retrieve(batch.id)).to_dict() == cancelled.to_dict()
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_every_faulty_line_is_reported(client: OpenAI, model: str) -> None:
    file_id = upload_batch(
        client, line(0, model), line(1, model, method="GET"), line(0, model), line(3, model, body={"model": model})
    )
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(input_file_id=file_id, endpoint=URL, completion_window="24h")
    message = str(caught.value)
    for fault in ("Line 2: method", "Line 3: custom_id", "Line 4: messages"):
        assert fault in message
    assert client.batches.list(limit=1).data == [] or file_id not in str(client.batches.list(limit=1).data)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file-1"}, "input_file_id"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, "output_expires_after"),
    ],
)
def test_an_invalid_request_names_its_parameter(client: OpenAI, model: str, fields: Any, param: str) -> None:
    file_id = upload_batch(client, line(0, model))
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(
            **{"input_file_id": file_id, "endpoint": URL, "completion_window": "24h", **fields}  # pyright: ignore
        )
    assert caught.value.param == param


def test_models_and_files_must_exist(client: OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        create(client, "unknown")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="architecture without weights"):
        create(client, BASE_MODEL)
    with pytest.raises(openai.BadRequestError, match="uploaded with another purpose"):
        client.batches.create(input_file_id=upload(client), endpoint=URL, completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="a batch of requests and not data"):
        client.fine_tuning.jobs.create(model=BASE_MODEL, training_file=upload_batch(client, line(0, model)))
    with pytest.raises(openai.NotFoundError, match="not a batch"):
        client.batches.retrieve(model)
    batch = create(client, model)
    with pytest.raises(openai.ConflictError):
        client.files.delete(batch.input_file_id)
    with pytest.raises(openai.NotFoundError, match="not a training"):
        client.fine_tuning.jobs.retrieve(batch.id)


def test_a_retry_of_a_lost_response_returns_the_same_batch(client: OpenAI, model: str) -> None:
    file_id = upload_batch(client, line(0, model))

    def send(count: int) -> str:
        return client.batches.create(
            input_file_id=file_id,
            endpoint=URL,
            completion_window="24h",
            extra_headers={"x-stainless-retry-count": str(count)},
        ).id

    first = send(0)
    assert send(1) == send(2) == first
    assert send(0) != first


def test_a_completed_batch_has_an_output_and_an_error_file(client: OpenAI, model: str, rows: Rows) -> None:
    batch = create(client, model)
    rows.attempt(batch.id, to=JobStatus.SUCCEEDED)
    rows.change(batch.id, result={"num_answered": 2, "num_failed": 1, "prompt_tokens": 30, "completion_tokens": 10})
    files: Any = {"output.jsonl": ("results", b'{"a": 1}\n{"a": 2}\n'), "errors.jsonl": ("results", b'{"e": 1}\n')}
    rows.checkpoint(batch.id, "final", 3, files)
    done = strictly(client.batches.retrieve(batch.id))
    assert done.status == "completed"
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 3, "completed": 2, "failed": 1}
    assert done.usage is not None
    assert (done.usage.input_tokens, done.usage.output_tokens, done.usage.total_tokens) == (30, 10, 40)
    assert done.output_file_id is not None
    assert done.error_file_id is not None
    assert client.files.content(done.output_file_id).text == '{"a": 1}\n{"a": 2}\n'
    assert client.files.content(done.error_file_id).text == '{"e": 1}\n'
    described = strictly(client.files.retrieve(done.output_file_id))
    assert (described.purpose, described.bytes) == ("batch_output", 18)
    listed = [file.id for file in client.files.list(purpose="batch_output")]
    assert listed == [done.output_file_id, done.error_file_id]
    assert set(listed) < {file.id for file in client.files.list()}
    assert done.output_file_id not in [file.id for file in client.files.list(purpose="fine-tune-results")]
    with pytest.raises(openai.BadRequestError, match="is a result of"):
        client.files.delete(done.output_file_id)


def test_a_cancelled_batch_has_the_answers_until_then(client: OpenAI, model: str, rows: Rows) -> None:
    batch = create(client, model)
    rows.attempt(batch.id, to=JobStatus.CANCELLED, reason=StatusReason.CANCELLED_BY_USER)
    rows.change(batch.id, progress={"phase": "answering", "step": 3, "total_steps": 3, "num_failed": 1})
    nothing = strictly(client.batches.retrieve(batch.id))
    assert (nothing.status, nothing.output_file_id, nothing.usage) == ("cancelled", None, None)
    assert nothing.request_counts is not None
    assert nothing.request_counts.to_dict() == {"total": 3, "completed": 0, "failed": 0}

    files: Any = {"output.jsonl": ("results", b'{"a": 1}\n'), "errors.jsonl": ("results", b'{"e": 1}\n')}
    metrics = {"num_answered": 1.0, "num_failed": 1.0, "prompt_tokens": 20.0, "completion_tokens": 5.0}
    rows.checkpoint(batch.id, "step-1", 1, {**files, "errors.jsonl": ("results", b"")}, metrics={"num_answered": 1.0})
    rows.checkpoint(batch.id, "step-2", 2, files, metrics=metrics)
    cancelled = strictly(client.batches.retrieve(batch.id))
    assert cancelled.request_counts is not None
    assert cancelled.request_counts.to_dict() == {"total": 3, "completed": 1, "failed": 1}
    assert cancelled.usage is not None
    assert cancelled.usage.total_tokens == 25
    assert cancelled.output_file_id is not None
    assert cancelled.error_file_id is not None
    assert client.files.content(cancelled.output_file_id).text == '{"a": 1}\n'
    assert strictly(client.files.retrieve(cancelled.error_file_id)).bytes == 9
    assert client.batches.list(limit=1).data[0].output_file_id == cancelled.output_file_id


def test_a_failed_batch_has_its_error(client: OpenAI, model: str, rows: Rows) -> None:
    batch = create(client, model)
    rows.attempt(batch.id, to=JobStatus.FAILED, reason=StatusReason.INVALID_MODEL)
    rows.change(batch.id, error={"code": "invalid_model", "message": "The weights are damaged."})
    failed = strictly(client.batches.retrieve(batch.id))
    assert failed.status == "failed"
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert [(error.code, error.message) for error in failed.errors.data] == [
        ("invalid_model", "The weights are damaged.")
    ]


def test_the_progress_of_a_running_batch_is_shown(client: OpenAI, model: str, rows: Rows) -> None:
    batch = create(client, model)
    rows.attempt(batch.id)
    rows.change(batch.id, progress={"phase": "answering", "step": 2, "total_steps": 3, "num_failed": 1})
    running = strictly(client.batches.retrieve(batch.id))
    assert running.status == "in_progress"
    assert running.request_counts is not None
    assert running.request_counts.to_dict() == {"total": 3, "completed": 1, "failed": 1}
    assert strictly(client.batches.cancel(batch.id)).status == "cancelling"


def test_the_dashboard_and_the_command_line_show_a_batch(
    server: ServerProcess, client: OpenAI, model: str, rows: Rows, tmp_path: Path
) -> None:
    batch = create(client, model)
    rows.attempt(batch.id, progress=[{"phase": "answering", "step": 2, "total_steps": 3, "num_failed": 1}])
    with httpx.Client(base_url=server.url, follow_redirects=True, timeout=30) as browser:
        assert browser.post("/login", data={"key": API_KEY}).status_code == 200
        for tab in ("", "/log", "/events", "/checkpoints", "/settings"):
            page = browser.get(f"/jobs/{batch.id}{tab}")
            assert page.status_code == 200, (tab, page.text)
        assert "batch of 3 requests" in browser.get(f"/jobs/{batch.id}").text
    environment = {**clean_environment(), "ZETA_URL": server.url, "ZETA_API_KEY": API_KEY, "ZETA_HOME": str(tmp_path)}
    for words in (["jobs", "--kind", "batch"], ["job", batch.id], ["events", batch.id]):
        done = subprocess.run(
            [str(ZETA), *words], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "answering" in done.stdout or words[0] != "events"
