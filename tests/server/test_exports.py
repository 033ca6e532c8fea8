"""Export jobs over HTTP: creating, listing, filtering and commanding them."""

from typing import Any

import httpx
import pytest

from tests.server.rows import Rows
from tests.server.server_process import SPEC
from zeta_core.contract.spec.resolved_spec import ResolvedSpec


@pytest.fixture
def trained(rows: Rows) -> str:
    """A training with a whole model as its final checkpoint."""
    job_id = rows.job()
    rows.checkpoint(job_id, "final", 5, {"model.safetensors": ("weights", b"x")})
    return job_id


def export(http: httpx.Client, job_id: str, **fields: Any) -> dict[str, Any]:
    created = http.post(f"/v1/jobs/{job_id}/exports", json={"to": "merged", **fields})
    assert created.status_code == 201, created.text
    assert created.headers["location"] == f"/v1/jobs/{created.json()['id']}"
    return created.json()


def test_an_export_is_a_queued_job_of_its_own_kind(http: httpx.Client, trained: str) -> None:
    job = export(http, trained, type="f16", checkpoint="latest", entity_name="for vLLM", metadata={"team": "a"})
    assert (job["kind"], job["status"], job["entity_name"]) == ("export", "queued", "for vLLM")
    assert job["spec"]["model"] == {"job": trained, "checkpoint": "final"}
    assert (job["resolved_spec"]["type"], job["metadata"]) == ("f16", {"team": "a"})
    listed = http.get(f"/v1/jobs/{trained}/exports").json()["data"]
    assert [each["id"] for each in listed] == [job["id"]]


def test_an_export_is_compared_on_the_held_out_data_of_the_job(http: httpx.Client, rows: Rows) -> None:
    content = b'{"text": "The sea."}\n'
    sent = http.post("/v1/files", files={"file": ("held_out.jsonl", content)}, data={"purpose": "dataset"})
    file_id = sent.raise_for_status().json()["id"]
    job_id = rows.job(spec={"eval_dataset": {"file": file_id}})
    rows.checkpoint(job_id, "final", 5, {"model.safetensors": ("weights", b"x")})
    found = export(http, job_id)["resolved_spec"]["held_out"]
    assert (found["dataset"]["file"], found["eval_split"]) == (file_id, None)

    http.delete(f"/v1/files/{file_id}").raise_for_status()
    assert "held_out" not in export(http, job_id, type="f16")["resolved_spec"]

    split = rows.job(spec={"eval_split": 0.2, "seed": 7}, reported=ResolvedSpec.model_validate({"held_out": {"a": 1}}))
    rows.checkpoint(split, "final", 5, {"model.safetensors": ("weights", b"x")})
    found = export(http, split)["resolved_spec"]["held_out"]
    assert (found["eval_split"], found["seed"], found["dataset"]) == (0.2, 7, found["dataset"])


def test_lists_of_jobs_filter_by_kind(http: httpx.Client, trained: str) -> None:
    exported = export(http, trained)["id"]
    for kind, expected in (("export", exported), ("training", trained)):
        found = [job["id"] for job in http.get("/v1/jobs", params={"kind": kind, "limit": 100}).json()["data"]]
        assert (exported in found, trained in found) == (expected == exported, expected == trained)
    assert http.get("/v1/jobs", params={"kind": "walk"}).status_code == 422


def test_a_repeated_request_returns_the_same_export(http: httpx.Client, trained: str) -> None:
    path, headers = f"/v1/jobs/{trained}/exports", {"Idempotency-Key": f"export-{trained}"}
    first, second = (http.post(path, json={"to": "gguf"}, headers=headers) for _ in range(2))
    assert first.json()["id"] == second.json()["id"]
    assert second.headers["idempotent-replayed"] == "true"
    assert len(http.get(path).json()["data"]) == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "to"),
        ({"to": "onnx"}, "to"),
        ({"to": "adapter"}, "to"),
        ({"to": "merged", "type": "q8_0"}, "type"),
        ({"to": "gguf", "seed": 1}, "seed"),
    ],
)
def test_an_impossible_export_is_refused_with_its_field(
    http: httpx.Client, trained: str, body: dict[str, Any], param: str
) -> None:
    refused = http.post(f"/v1/jobs/{trained}/exports", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, param), refused.text


def test_only_a_stored_checkpoint_of_a_training_is_exported(http: httpx.Client, rows: Rows, trained: str) -> None:
    missing = http.post(f"/v1/jobs/{trained}/exports", json={"to": "merged", "checkpoint": "step-9"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "checkpoint_not_found")
    of_export = http.post(f"/v1/jobs/{export(http, trained)['id']}/exports", json={"to": "merged"})
    assert of_export.json()["error"]["code"] == "not_a_training"
    assert http.post(f"/v1/jobs/{rows.job()}/exports", json={"to": "merged"}).status_code == 404


def test_commands_that_only_a_training_supports_are_refused(http: httpx.Client, trained: str) -> None:
    job_id = export(http, trained)["id"]
    saved = http.post(f"/v1/jobs/{job_id}/checkpoint")
    assert (saved.status_code, saved.json()["error"]["code"]) == (409, "not_a_training")
    continued = http.post(f"/v1/jobs/{job_id}/rerun", json={"from": "latest"})
    assert continued.json()["error"]["code"] == "not_a_training"
    based = http.post("/v1/jobs", json={**SPEC, "model": {"job": job_id}})
    assert (based.status_code, based.json()["error"]["code"]) == (422, "not_a_training")
    again = http.post(f"/v1/jobs/{job_id}/rerun", json={"patch": {"to": "gguf", "type": "q8_0"}})
    assert (again.status_code, again.json()["kind"], again.json()["spec"]["to"]) == (201, "export", "gguf")
    other = http.post(f"/v1/jobs/{job_id}/rerun", json={"patch": {"model": {"checkpoint": "step-4"}}})
    assert (other.status_code, other.json()["error"]["param"]) == (422, "patch.model")
    assert http.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    assert http.get(f"/openai/v1/fine_tuning/jobs/{job_id}").status_code == 404


def test_a_training_is_not_deleted_while_it_is_exported(http: httpx.Client, rows: Rows, trained: str) -> None:
    rows.change(trained, status="succeeded")
    job_id = export(http, trained)["id"]
    refused = http.delete(f"/v1/jobs/{trained}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "job_in_use")
    http.post(f"/v1/jobs/{job_id}/cancel")
    assert http.delete(f"/v1/jobs/{trained}").status_code == 200
