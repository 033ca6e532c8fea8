"""Creating evaluations on a server without workers."""

from typing import Any

import httpx
import pytest

from tests.server.rows import Rows
from tests.server.server_process import SPEC, ServerProcess, error_of
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.spec.resolved_spec import ResolvedSpec

RESOLVED = ResolvedSpec.model_validate({"model": SPEC["model"], "seq_len": 64, "template_date": "2026-11-20"})


def upload(http: httpx.Client, purpose: str = "dataset", name: str = "held_out.jsonl") -> str:
    content = b'{"text": "The Rhine is a river."}\n'
    sent = http.post("/v1/files", files={"file": (name, content)}, data={"purpose": purpose})
    return sent.raise_for_status().json()["id"]


@pytest.fixture
def trained(rows: Rows) -> str:
    return trained_job(rows)


def trained_job(rows: Rows, **options: Any) -> str:
    """A succeeded job with a final checkpoint; ``options`` are those of `Rows.job`."""
    job_id = rows.job(**options)
    rows.change(job_id, resolved_spec=RESOLVED)
    rows.attempt(job_id, to=JobStatus.SUCCEEDED)
    rows.checkpoint(job_id, "final", 4, {"model.safetensors": ("weights", b"weights")})
    return job_id


def evaluate(http: httpx.Client, job: str, *, key: str | None = None, **body: Any) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return http.post(f"/v1/jobs/{job}/evaluations", json=body, headers=headers)


def test_an_evaluation_reads_the_file_as_the_training_of_the_job(http: httpx.Client, rows: Rows) -> None:
    data = {"builtin": "python-docs"}
    eval_data = {"file": upload(http), "columns": {"text": "body"}}
    trained = trained_job(rows, spec={"dataset": data, "eval_dataset": eval_data, "overlong": "drop"})
    file_id = upload(http)
    sent = evaluate(http, trained, file=file_id, entity_name="rivers", priority=3, metadata={"team": "a"})
    assert sent.status_code == 201, sent.text
    job = sent.json()
    assert sent.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert (job["kind"], job["status"], job["entity_name"]) == ("evaluation", "queued", "rivers")
    spec = job["spec"]
    assert (spec["priority"], spec["max_retries"]) == (3, 3)
    assert spec["model"] == {"job": trained, "checkpoint": "final"}
    assert (spec["dataset"]["file"], spec["dataset"]["columns"]) == (file_id, {"text": "body"})
    assert (spec["seq_len"], spec["overlong"], spec["template_date"]) == (64, "drop", "2026-11-20")
    assert (spec["base"], job["metadata"]) == (None, {"team": "a"})
    assert job["id"] in [each["id"] for each in http.get("/v1/jobs?kind=evaluation").json()["data"]]


def test_an_evaluation_is_not_listed_among_the_jobs_of_its_file(http: httpx.Client, trained: str) -> None:
    content = b'{"text": "Seen once."}\n'
    sent = http.post("/v1/files", files={"file": ("seen.jsonl", content)}, data={"purpose": "dataset"})
    file_id = sent.raise_for_status().json()["id"]
    assert evaluate(http, trained, file=file_id).status_code == 201
    assert http.get(f"/v1/files/{file_id}/jobs").json()["data"] == []


def test_a_repeated_request_returns_the_same_evaluation(http: httpx.Client, trained: str) -> None:
    file_id = upload(http)
    first, second = (evaluate(http, trained, key="evaluation-1", file=file_id) for _ in range(2))
    assert second.headers["Idempotent-Replayed"] == "true"
    assert first.json()["id"] == second.json()["id"]
    other = evaluate(http, trained, key="evaluation-1", file=file_id, base=True)
    assert error_of(other)["code"] == "idempotency_key_reused"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"file": "file_000000000000000000000000"}, "file", "file_not_found"),
        ({"checkpoint": "step-7"}, "checkpoint", "checkpoint_not_found"),
        ({"base": True}, "base", "cannot_evaluate"),
        ({"base": "yes"}, "base", "invalid_type"),
        ({"train_on": "all"}, "train_on", "unknown_field"),
    ],
    ids=["unknown file", "unknown checkpoint", "no base", "wrong type", "unknown field"],
)
def test_an_invalid_field_is_named(
    http: httpx.Client, trained: str, body: dict[str, Any], param: str, code: str
) -> None:
    refused = evaluate(http, trained, **{"file": upload(http), **body})
    error = error_of(refused)
    assert (refused.status_code, error["param"], error["code"]) == (422, param, code), error


def test_a_file_with_another_purpose_is_refused(http: httpx.Client, trained: str) -> None:
    sent = http.post("/openai/v1/files", files={"file": ("a.jsonl", b"{}\n")}, data={"purpose": "batch"})
    refused = evaluate(http, trained, file=sent.raise_for_status().json()["id"])
    assert (error_of(refused)["param"], error_of(refused)["code"]) == ("file", "wrong_purpose")


def test_a_job_without_a_loss_per_token_is_refused(http: httpx.Client, rows: Rows) -> None:
    pairs = trained_job(rows, spec={"method": "dpo", "dataset": {"file": upload(http), "format": "preference"}})
    assert error_of(evaluate(http, pairs, file=upload(http)))["code"] == "cannot_evaluate"


def test_an_evaluation_can_not_be_evaluated(http: httpx.Client, trained: str) -> None:
    file_id = upload(http)
    job = evaluate(http, trained, file=file_id).json()["id"]
    refused = evaluate(http, job, file=file_id)
    assert (refused.status_code, error_of(refused)["code"]) == (404, "not_a_training")


def test_objects_of_another_project_are_not_found(
    server: ServerProcess, http: httpx.Client, rows: Rows, trained: str
) -> None:
    http.post("/v1/projects", json={"name": "other"}).raise_for_status()
    rows.key("of-other", project="other", scopes=["submit"])
    with server.http("of-other") as stranger:
        assert evaluate(stranger, trained, file=upload(stranger)).status_code == 404
        own = trained_job(rows, project="other")
        assert error_of(evaluate(stranger, own, file=upload(http)))["code"] == "file_not_found"


@pytest.mark.parametrize(
    ("patch", "param"),
    [
        ({"base": "owner/private-model"}, "patch.base"),
        ({"fingerprint": "0" * 64}, "patch.fingerprint"),
        ({"resources": {"nodes": 2}}, "resources.nodes"),
        ({"resources": {"processes": 1024}}, "resources.processes"),
    ],
)
def test_a_rerun_changes_only_what_the_user_has_chosen(
    http: httpx.Client, trained: str, patch: dict[str, Any], param: str
) -> None:
    """The server derives the other fields, and checks them: a base could be private, and two machines would wait."""
    job = evaluate(http, trained, file=upload(http)).json()["id"]
    refused = http.post(f"/v1/jobs/{job}/rerun", json={"patch": patch})
    assert (refused.status_code, error_of(refused)["param"]) == (422, param), refused.text
    other = upload(http)
    again = http.post(f"/v1/jobs/{job}/rerun", json={"patch": {"priority": 2, "dataset": {"file": other}}})
    assert (again.status_code, again.json()["spec"]["dataset"]["file"]) == (201, other), again.text
    assert again.json()["kind"] == "evaluation"


def test_a_base_on_the_hub_needs_access_when_the_evaluation_is_created(http: httpx.Client, rows: Rows) -> None:
    trained = trained_job(rows)
    job = evaluate(http, trained, file=upload(http)).json()["id"]
    rows.change(job, spec={**http.get(f"/v1/jobs/{job}").json()["spec"], "base": "owner/private-model"})
    http.patch("/v1/projects/default", json={"limits": {"hub": "off"}}).raise_for_status()
    refused = http.post(f"/v1/jobs/{job}/rerun", json={})
    assert (error_of(refused)["param"], error_of(refused)["code"]) == ("base", "hub_not_allowed")
    http.patch("/v1/projects/default", json={"limits": {"hub": "operator-token"}}).raise_for_status()
