"""Bodies of requests that refer to objects of another project: the answer is that for objects that don't exist."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.server.rows import Rows
from tests.server.server_process import SPEC, ServerProcess, submit
from zeta_core.contract.job.status import JobStatus

CANARY = "canary-of-project-a"
ROWS = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 12
UNKNOWN = {"file_not_found", "job_not_found", "model_not_found", "webhook_not_found", "invalid_part"}
CHATS, ANSWERS = "/openai/v1/chat/completions", "/openai/v1/completions"
ZEROS = "0" * 23


@dataclass(frozen=True)
class References:
    """What a request can refer to. Those of project A exist; those of `MISSING` don't."""

    job_id: str
    export_id: str
    batch_id: str
    dataset: str
    batch_file: str
    model_file: str
    part: str
    webhook: str
    model_name: str

    def hidden(self, response: httpx.Response) -> tuple[int, str]:
        """The status and the text of a response, without the ids and names that the request contained."""
        text = response.text
        for name, value in vars(self).items():
            text = text.replace(value, name).replace(value.removeprefix("job_"), name)  # ft:llama:a::<id>
        return response.status_code, text


MISSING = References(
    job_id=f"job_{ZEROS}1",
    export_id=f"job_{ZEROS}2",
    batch_id=f"job_{ZEROS}3",
    dataset=f"file_{ZEROS}4",
    batch_file=f"file_{ZEROS}5",
    model_file=f"file_{ZEROS}6",
    part=f"part_{ZEROS}7",
    webhook=f"webhook_{ZEROS}8",
    model_name="missing-name",
)


@dataclass(frozen=True)
class OwnObjects:
    """The objects of project B, which send the requests past all other checks."""

    job_id: str
    training_file: str
    upload: str


def upload(http: httpx.Client, content: bytes, purpose: str, name: str = "a.jsonl") -> str:
    path = "/v1/files" if purpose in ("dataset", "model") else "/openai/v1/files"
    sent = http.post(path, files={"file": (name, content)}, data={"purpose": purpose})
    assert sent.is_success, sent.text
    return sent.json()["id"]


def batch_of(model: str) -> bytes:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line).encode() + b"\n"


def new_upload(http: httpx.Client) -> str:
    body = {"bytes": 1, "filename": "a.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    return http.post("/openai/v1/uploads", json=body).json()["id"]


def trained(rows: Rows, project: str) -> str:
    job_id = rows.job(project=project)
    rows.attempt(job_id, to=JobStatus.SUCCEEDED)
    rows.checkpoint(job_id, "final", 4, {"model.safetensors": ("weights", CANARY.encode())})
    return job_id


@pytest.fixture(scope="module")
def foreign(server: ServerProcess, rows: Rows) -> References:
    rows.key("submit-of-a", project="a", scopes=["submit"])
    job_id = trained(rows, "a")
    with server.http("submit-of-a") as http:
        upload_id = new_upload(http)
        batch_file = upload(http, batch_of(job_id), "batch")
        batch = {"input_file_id": batch_file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        model_name = f"name-{CANARY}"
        http.post("/v1/models", json={"name": model_name, "model": {"job": job_id}}).raise_for_status()
        return References(
            job_id=job_id,
            export_id=http.post(f"/v1/jobs/{job_id}/exports", json={"to": "merged"}).json()["id"],
            batch_id=http.post("/openai/v1/batches", json=batch).json()["id"],
            dataset=upload(http, ROWS, "dataset"),
            batch_file=batch_file,
            model_file=upload(http, ROWS, "fine-tune"),
            part=http.post(f"/openai/v1/uploads/{upload_id}/parts", files={"data": ("a", b"a")}).json()["id"],
            webhook=http.post("/v1/webhooks", json={"url": f"https://example.org/{CANARY}"}).json()["id"],
            model_name=model_name,
        )


@pytest.fixture(scope="module")
def own(server: ServerProcess, rows: Rows) -> OwnObjects:
    rows.key("submit-of-b", project="b", scopes=["submit"])
    with server.http("submit-of-b") as http:
        return OwnObjects(trained(rows, "b"), upload(http, ROWS, "fine-tune"), new_upload(http))


def specs(to: References) -> Iterator[dict[str, Any]]:
    """Fields of job specs, one for each way to refer to an object."""
    for file_id in (to.dataset, to.batch_file, to.model_file):
        yield {"dataset": {"file": file_id}}
        yield {"dataset": [{"builtin": "python-docs"}, {"file": file_id}]}
        yield {"eval_dataset": {"file": file_id}}
        yield {"model": {"file": file_id}}
        yield {"tokenizer": {"file": file_id}}
    for job_id in (to.job_id, to.export_id, to.batch_id):
        for name in ("final", "latest", "step-1"):
            yield {"model": {"job": job_id, "checkpoint": name}}
        for name in ("final", "step-1"):
            yield {"resume_from_checkpoint": f"{job_id}/{name}"}
        yield {"model": {"job": job_id}, "lora": {"continue_adapter": True}}
        yield {"resume_from_checkpoint": job_id}
    yield {"notify": [{"to": to.webhook}]}


def requests(to: References, own: OwnObjects, http: httpx.Client) -> Iterator[tuple[str, dict[str, Any]]]:
    """Paths and bodies that refer to the objects ``to``."""
    for fields in specs(to):
        yield "/v1/jobs", {**SPEC, **fields}
        yield "/v1/jobs/validate", {**SPEC, **fields}
        yield "/v1/sweeps", {"spec": {**SPEC, **fields}, "grid": {"seed": [1, 2]}}
        if "model" in fields and "lora" not in fields:
            yield "/v1/models", {"name": "own-name", **fields}
    yield f"/v1/jobs/{own.job_id}/evaluations", {"file": to.dataset}
    yield f"/openai/v1/uploads/{own.upload}/complete", {"part_ids": [to.part]}
    tuning, messages = "/openai/v1/fine_tuning/jobs", [{"role": "user", "content": "Hi"}]
    for field in ("training_file", "validation_file"):
        for file_id in (to.dataset, to.batch_file, to.model_file):
            yield tuning, {"model": own.job_id, "training_file": own.training_file, field: file_id}
    for trainer in ({"tokenizer": {"file": to.model_file}}, {"notify": [{"to": to.webhook}]}):
        yield tuning, {"model": own.job_id, "training_file": own.training_file, "trainer": trainer}
    batch = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    yield "/openai/v1/batches", {"input_file_id": to.batch_file, **batch}
    for job_id in (to.job_id, to.export_id, to.batch_id):
        full = f"ft:llama:a::{job_id.removeprefix('job_')}"
        for model in (job_id, f"{job_id}/final", f"{job_id}/base", full, to.model_name):
            yield tuning, {"model": model, "training_file": own.training_file}
            yield CHATS, {"model": model, "messages": messages}
            yield ANSWERS, {"model": model, "prompt": "Hi"}
            yield "/openai/v1/batches", {"input_file_id": upload(http, batch_of(model), "batch"), **batch}


def test_a_body_cannot_refer_to_an_object_of_another_project(
    server: ServerProcess, foreign: References, own: OwnObjects
) -> None:
    with server.http("submit-of-b") as stranger:
        before = stranger.get("/v1/jobs").json()["data"]
        pairs = list(zip(requests(foreign, own, stranger), requests(MISSING, own, stranger), strict=True))
        assert len(pairs) > 150
        for (path, body), (_, missing) in pairs:
            response = stranger.post(path, json=body)
            assert response.status_code in (400, 404, 422), (path, body, response.text)
            assert response.json()["error"]["code"] in UNKNOWN, (path, body, response.text)
            assert CANARY not in response.text.replace(foreign.model_name, "")
            of_missing = stranger.post(path, json=missing)
            assert foreign.hidden(response) == MISSING.hidden(of_missing), (path, body)
        assert stranger.get("/v1/jobs").json()["data"] == before, "no request has created a job"


def test_jobs_of_every_kind_are_neither_changed_nor_deleted_by_another_project(
    server: ServerProcess, foreign: References, own: OwnObjects
) -> None:
    with server.http("submit-of-b") as stranger, server.http("submit-of-a") as http:
        jobs = (foreign.job_id, foreign.export_id, foreign.batch_id, submit(http)["id"])
        before = [http.get(f"/v1/jobs/{job_id}").json() for job_id in jobs]
        for job_id in jobs:
            bodies = {"exports": {"to": "merged"}, "evaluations": {"file": own.training_file}}
            for action in ("cancel", "pause", "resume", "checkpoint", "rerun", "exports", "evaluations"):
                refused = stranger.post(f"/v1/jobs/{job_id}/{action}", json=bodies.get(action))
                assert refused.status_code == 404, (job_id, action, refused.text)
            assert stranger.delete(f"/v1/jobs/{job_id}").status_code == 404
            assert stranger.post(f"/openai/v1/batches/{job_id}/cancel").status_code == 404
            assert stranger.post(f"/openai/v1/fine_tuning/jobs/{job_id}/cancel").status_code == 404
            assert stranger.delete(f"/openai/v1/models/{job_id}").status_code == 404
        assert [http.get(f"/v1/jobs/{job_id}").json() for job_id in jobs] == before
