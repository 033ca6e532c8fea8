"""The main workflow, from POST to a verified, loadable checkpoint, on real text."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.specs import PYTHON_REFERENCE, as_jsonl, endless_job, tiny_job
from tests.harness.service import Service, parse_sse, processes_of_job, wait_for_end
from tests.harness.waiting import wait_until

LOAD_AND_GENERATE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("The ", return_tensors="pt", add_special_tokens=False).input_ids
out = model.generate(ids, max_new_tokens=4, do_sample=False)
assert out.shape[1] > ids.shape[1]
print("generated", out.shape[1])
"""


def submit(http: httpx.Client, spec: dict[str, Any], **headers: str) -> dict[str, Any]:
    response = http.post("/v1/jobs", json=spec, headers=headers)
    assert response.status_code == 201, response.text
    assert response.headers["location"].endswith(f"/v1/jobs/{response.json()['id']}")
    return response.json()


def step_of(http: httpx.Client, job_id: str) -> int:
    progress = http.get(f"/v1/jobs/{job_id}").json()["progress"] or {}
    return int(progress.get("step") or 0)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("filename", ["reference.txt", pytest.param("reference.jsonl", marks=pytest.mark.slow)])
def test_a_posted_job_ends_with_a_verified_loadable_checkpoint(
    http: httpx.Client, service: Service, tmp_path: Path, filename: str
) -> None:
    content = PYTHON_REFERENCE.encode() if filename.endswith(".txt") else as_jsonl(PYTHON_REFERENCE)
    uploaded = http.post("/v1/files", files={"file": (filename, content)}, data={"purpose": "dataset"})
    assert uploaded.status_code == 201, uploaded.text
    file = uploaded.json()
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert (file["bytes"], file["filename"], file["purpose"]) == (len(content), filename, "dataset")

    job = submit(http, tiny_job(dataset={"file": file["id"]}, max_steps=12, entity_name="whole-way"))
    assert (job["status"], job["attempt"], job["project"]) == ("queued", 0, "default")
    ended = wait_for_end(http, job["id"])
    assert (ended["status"], ended["status_reason"]) == ("succeeded", "completed"), service.log()
    assert ended["final_checkpoint"] == "final"
    assert ended["attempts"][0]["last_step"] == 12
    assert ended["result"]["tokens"] == ended["progress"]["tokens"] > 0

    # The events are in order and complete, and the loss falls.
    events = http.get(f"/v1/jobs/{job['id']}/events?limit=1000").json()["data"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["status"] for event in events if event["type"] == "status"][-1] == "succeeded"
    metrics = http.get(f"/v1/jobs/{job['id']}/metrics").json()
    assert metrics["step"] == list(range(1, 13)), "short steps are reported as well"
    assert metrics["loss"][-1] < metrics["loss"][0]
    names = {checkpoint["name"] for checkpoint in http.get(f"/v1/jobs/{job['id']}/checkpoints").json()["data"]}
    assert {"step-12", "final"} <= names

    # Each file of the final checkpoint matches the manifest, and the model loads and generates text.
    manifest = http.get(f"/v1/jobs/{job['id']}/checkpoints/final").json()
    directory = tmp_path / "final"
    for entry in manifest["files"]:
        response = http.get(f"/v1/jobs/{job['id']}/checkpoints/final/files/{entry['path']}")
        assert hashlib.sha256(response.content).hexdigest() == entry["sha256"]
        assert (len(response.content), response.headers["etag"]) == (entry["size"], f'"{entry["sha256"]}"')
        target = directory / entry["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(response.content)
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD_AND_GENERATE, str(directory)], capture_output=True, text=True, check=False
    )
    assert "generated" in loaded.stdout, loaded.stderr

    # The archive has the same files, without the training state.
    archive = http.get(f"/v1/jobs/{job['id']}/checkpoints/final/archive")
    assert int(archive.headers["content-length"]) == len(archive.content)
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
        members = {member.name.removeprefix("final/") for member in tar.getmembers() if member.isfile()}
    assert "model.safetensors" in members
    assert not any("training_state" in name for name in members)


@pytest.mark.timeout(400)
def test_the_command_line_submits_follows_downloads_and_verifies(service: Service, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(PYTHON_REFERENCE)
    (tmp_path / "spec.yaml").write_text(
        json.dumps({"model": tiny_job()["model"], "seq_len": 64, "batch_size": 4, "max_steps": 4})
    )
    words = ["submit", str(tmp_path / "spec.yaml"), "--data", str(tmp_path / "text.txt"), "--set", "learning_rate=1e-3"]
    followed = service.command(*words, "--follow")
    assert followed.returncode == 0, followed.stdout + followed.stderr + service.log()
    job = json.loads(service.command("job", "@last", "--json").stdout)
    assert job["resolved_spec"]["learning_rate"] == 1e-3
    downloaded = service.command("download", "@last", "-o", str(tmp_path / "model"))
    assert downloaded.returncode == 0, downloaded.stdout + downloaded.stderr
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.timeout(400)
def test_cancel_ends_a_running_job_with_all_of_its_processes(http: httpx.Client, service: Service) -> None:
    job = submit(http, endless_job())
    path = f"/v1/jobs/{job['id']}"
    wait_until(lambda: step_of(http, job["id"]) > 1, 90, "the run to have started")
    assert processes_of_job(job["id"])
    response = http.post(f"{path}/cancel")
    assert (response.status_code, response.json()["requested_action"]) == (202, "cancel")
    ended = wait_for_end(http, job["id"], 60)
    assert (ended["status"], ended["status_reason"]) == ("cancelled", "cancelled_by_user"), service.log()
    assert not processes_of_job(job["id"])
    assert http.post(f"{path}/cancel").status_code == 409


@pytest.mark.timeout(400)
def test_a_fault_in_the_data_fails_the_job_with_the_line_number(http: httpx.Client) -> None:
    content = b'{"text": "a line that is right"}\n{"text": "a line that is not\n'
    file = http.post("/v1/files", files={"file": ("broken.jsonl", content)}, data={"purpose": "dataset"}).json()
    job = submit(http, tiny_job(dataset={"file": file["id"]}, max_retries=3))
    ended = wait_for_end(http, job["id"])
    assert (ended["status"], ended["status_reason"], ended["attempt"]) == ("failed", "invalid_data", 1)
    assert "line 2" in ended["error"]["message"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_model_that_cannot_be_built_fails_the_job(http: httpx.Client) -> None:
    config = {**tiny_job()["model"]["config"], "hidden_size": 33}
    job = submit(http, tiny_job(model={"config": config}))
    ended = wait_for_end(http, job["id"])
    assert (ended["status"], ended["status_reason"]) == ("failed", "invalid_model")
    assert ended["error"]["message"]


@pytest.mark.timeout(400)
def test_the_live_stream_ends_with_the_job_and_matches_the_list(http: httpx.Client) -> None:
    job = submit(http, tiny_job(max_steps=4))
    path = f"/v1/jobs/{job['id']}/events"
    with http.stream("GET", path, headers={"Accept": "text/event-stream"}, timeout=120) as stream:
        text = "".join(stream.iter_text())
    streamed = parse_sse(text)
    assert streamed[-1]["sse_event"] == "end"
    listed = http.get(f"{path}?limit=1000").json()["data"]
    assert [int(event["sse_id"]) for event in streamed[:-1]] == [event["seq"] for event in listed]
    assert "retry: 2000" in text
    last = {"Accept": "text/event-stream", "Last-Event-ID": str(listed[-1]["seq"])}
    assert http.get(path, headers=last).status_code == 204


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_same_idempotency_key_returns_the_same_job(http: httpx.Client) -> None:
    first = submit(http, tiny_job(max_steps=2), **{"Idempotency-Key": "once"})
    again = http.post("/v1/jobs", json=tiny_job(max_steps=2), headers={"Idempotency-Key": "once"})
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (first["id"], "true")
    other = http.post("/v1/jobs", json=tiny_job(max_steps=3), headers={"Idempotency-Key": "once"})
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    wait_for_end(http, first["id"])


def test_the_log_of_a_job_is_readable_text(http: httpx.Client) -> None:
    jobs = http.get("/v1/jobs?status=succeeded").json()["data"]
    log = http.get(f"/v1/jobs/{jobs[-1]['id']}/logs")
    assert log.headers["content-type"].startswith("text/plain")
    assert "attempt 1" in log.text
