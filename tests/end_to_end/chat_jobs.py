"""Small jobs whose checkpoints answer."""

import json
from typing import Any

from tests.end_to_end.specs import TINY_LLAMA, tiny_job
from tests.harness.service import Service, wait_for_end

CONTEXT = 4096
MODEL: dict[str, Any] = {"config": {**TINY_LLAMA, "max_position_embeddings": CONTEXT}}
QUESTION: list[Any] = [{"role": "user", "content": "Which river?"}]


def chat_job(service: Service, **changes: Any) -> str:
    """Train on conversations; returns the id of the succeeded job."""
    turns = [*QUESTION, {"role": "assistant", "content": "The Rhine, of course."}]
    data = json.dumps({"messages": turns}).encode() + b"\n"
    with service.http() as http:
        sent = http.post("/v1/files", files={"file": ("chats.jsonl", data * 64)}, data={"purpose": "dataset"})
    file_id = sent.raise_for_status().json()["id"]
    return run(service, tiny_job(**{"model": MODEL, "dataset": {"file": file_id}, "seq_len": 128, **changes}))


def run(service: Service, spec: dict[str, Any]) -> str:
    """Run a job that must succeed; returns its id."""
    with service.http() as http:
        job_id = http.post("/v1/jobs", json=spec).raise_for_status().json()["id"]
        assert wait_for_end(http, job_id)["status"] == "succeeded", service.log()
    return job_id
