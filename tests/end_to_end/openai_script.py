"""A user's script: the life of a fine-tuning job, and a batch of its model, with the official `openai` client alone.

Usage: python openai_script.py BASE_URL API_KEY. It runs with the client's major versions 1, 2 and 3.
"""

import hashlib
import io
import json
import sys
import tarfile
import time
from typing import Any

from openai import NotFoundError, OpenAI
from openai.types.chat import ChatCompletion

MODEL = "gpt-4o-mini-2024-07-18"
PART_BYTES = 2000
TIMEOUT_SECONDS = 240


def strictly(answer: Any) -> Any:
    """``answer`` if its fields have exactly the types of the client's class; two statuses are missing there."""
    values = answer.model_dump(by_alias=True, warnings=False)
    if values.get("status") in ("paused", "pausing"):
        values["status"] = "running"
    type(answer).model_validate(values, strict=True)
    return answer


def conversations(start: int, number: int) -> bytes:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What follows {index}?"},
                {"role": "assistant", "content": f"{index + 1} follows."},
            ]
        }
        for index in range(start, start + number)
    ]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def upload_in_parts(client: OpenAI, content: bytes) -> str:
    upload = strictly(
        client.uploads.create(bytes=len(content), filename="train.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    )
    parts = [
        strictly(client.uploads.parts.create(upload.id, data=content[at : at + PART_BYTES])).id
        for at in range(0, len(content), PART_BYTES)
    ]
    assert len(parts) > 1
    completed = strictly(client.uploads.complete(upload.id, part_ids=parts, md5=hashlib.md5(content).hexdigest()))
    return completed.file.id


def wait_for(client: OpenAI, job_id: str, *statuses: str) -> Any:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        job = strictly(client.fine_tuning.jobs.retrieve(job_id))
        if job.status in statuses:
            return job
        assert job.status not in ("failed", "cancelled"), job
        assert time.monotonic() < deadline, job
        time.sleep(0.3)  # noqa: TID251 - a user's script


def wait_for_metrics(client: OpenAI, job_id: str) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not any(strictly(event).type == "metrics" for event in client.fine_tuning.jobs.list_events(job_id).data):
        assert time.monotonic() < deadline, "the job reported no metrics"
        time.sleep(0.2)  # noqa: TID251


def verify(archive: bytes) -> int:
    """Compare every file with the manifest's checksums; returns the number of files with weights."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # pyright: ignore[reportOptionalMemberAccess]
    listed = json.loads(files["manifest.json"])["files"]
    present = [file for file in listed if file["path"] in files]
    for file in present:
        assert hashlib.sha256(files[file["path"]]).hexdigest() == file["sha256"], file["path"]
    return sum(file["role"] in ("weights", "adapter") for file in present)


def run_batch(client: Any, model: str) -> None:
    """Answer two good requests and one that is too long in a batch, and read its files."""
    chat = {"model": model, "messages": [{"role": "user", "content": "What follows 7?"}], "temperature": 0}
    bodies = [{**chat, "max_tokens": 20}, {**chat, "max_tokens": 5000}, {**chat, "max_tokens": 20, "logprobs": True}]
    lines = [
        {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for number, body in enumerate(bodies)
    ]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    requests = strictly(client.files.create(file=("requests.jsonl", content), purpose="batch"))
    batch = strictly(
        client.batches.create(
            input_file_id=requests.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"script": "life"},
        )
    )
    assert batch.id in [strictly(listed).id for listed in client.batches.list(limit=10)]
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.2)  # noqa: TID251
        batch = strictly(client.batches.retrieve(batch.id))
    assert (batch.status, batch.metadata) == ("completed", {"script": "life"}), batch
    assert batch.request_counts.to_dict() == {"total": 3, "completed": 2, "failed": 1}
    first, last = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert (first["custom_id"], last["custom_id"]) == ("request-0", "request-2")
    answer = ChatCompletion.model_validate(first["response"]["body"], strict=True)
    alone = strictly(client.chat.completions.create(**bodies[0]))
    assert answer.choices[0].message.content == alone.choices[0].message.content
    assert json.loads(client.files.content(batch.error_file_id).text)["custom_id"] == "request-1"
    assert strictly(client.files.retrieve(batch.output_file_id)).purpose == "batch_output"
    assert strictly(client.files.delete(requests.id)).deleted


def main(base_url: str, api_key: str) -> None:
    client = OpenAI(base_url=base_url, api_key=api_key)
    assert MODEL in [strictly(model).id for model in client.models.list()]
    training = upload_in_parts(client, conversations(0, 100))
    validation = strictly(client.files.create(file=conversations(500, 10), purpose="fine-tune")).id

    job = strictly(
        client.fine_tuning.jobs.create(
            model=MODEL,
            training_file=training,
            validation_file=validation,
            suffix="counting",
            seed=3,
            metadata={"script": "life"},
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 60, "batch_size": 4, "learning_rate_multiplier": 10.0}},
            },
            extra_body={"trainer": {"checkpointing_steps": 300, "eval_steps": 300}},
        )
    )
    assert job.hyperparameters.to_dict() == {"batch_size": 4, "learning_rate_multiplier": 10.0, "n_epochs": 60}
    wait_for_metrics(client, job.id)
    client.fine_tuning.jobs.pause(job.id)
    wait_for(client, job.id, "paused")
    client.fine_tuning.jobs.resume(job.id)
    job = wait_for(client, job.id, "succeeded")
    assert job.fine_tuned_model == f"ft:{MODEL}:default:counting:{job.id.removeprefix('job_')}"
    assert job.trained_tokens > 0

    events = [strictly(event) for event in client.fine_tuning.jobs.list_events(job.id, limit=50)]
    assert len({event.id for event in events}) == len(events) > 50
    checkpoints = [strictly(checkpoint) for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id)]
    assert checkpoints[0].step_number == 1500
    measured = checkpoints[0].metrics
    assert None not in (measured.train_loss, measured.valid_loss, measured.train_mean_token_accuracy)
    assert 0 < measured.full_valid_mean_token_accuracy <= 1

    metrics, weights = job.result_files
    rows = client.files.content(metrics).text.splitlines()
    assert rows[0].startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,")
    assert strictly(client.files.retrieve(weights)).purpose == "fine-tune-results"
    num_weights = verify(client.files.content(weights).read())
    assert num_weights > 0

    assert strictly(client.models.retrieve(job.fine_tuned_model)).id == job.fine_tuned_model
    run_batch(client, job.fine_tuned_model)
    assert strictly(client.models.delete(job.fine_tuned_model)).deleted
    for file_id in (training, validation):
        assert strictly(client.files.delete(file_id)).deleted
    try:
        client.fine_tuning.jobs.retrieve(job.id)
    except NotFoundError:
        print(json.dumps({"job": job.id, "last_step": int(rows[-1].partition(",")[0]), "weights": num_weights}))
    else:
        raise AssertionError("the deleted job exists")


if __name__ == "__main__":
    main(*sys.argv[1:])
