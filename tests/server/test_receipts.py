"""Receipts of jobs, verifying a downloaded model with one, and the lineage of files."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness.service import ZETA, clean_environment
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.rows import Rows
from tests.server.server_process import API_KEY, SPEC, ServerProcess, error_of, running_server, submit
from zeta.client import Client
from zeta.receipts import InvalidReceipt, verify
from zeta_core.contract.errors import Conflict, NotFound
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.spec.resolved_spec import ResolvedSpec

FILES: dict[str, Any] = {
    "model.safetensors": ("weights", b"weights"),
    "config.json": ("config", b"{}"),
    "training_state/state.pt": ("state", b"state"),
}


@pytest.fixture(scope="module")
def server(
    module_database_url: str | None, shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    home = tmp_path_factory.mktemp("server")
    with running_server(home, shared_valkey.second_url, module_database_url) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.url, API_KEY) as opened:
        yield opened


def trained_job(http: httpx.Client, rows: Rows, **fields: Any) -> str:
    """A job that has ended with a final checkpoint."""
    job_id: str = submit(http, **fields)["id"]
    rows.attempt(job_id)
    rows.checkpoint(job_id, "final", 4, FILES)
    rows.end(job_id, JobStatus.SUCCEEDED)
    return job_id


def upload(http: httpx.Client, name: str) -> str:
    files = {"file": (name, f"text of {name}".encode())}
    return http.post("/v1/files", files=files, data={"purpose": "dataset"}).json()["id"]


def zeta(server: ServerProcess, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**clean_environment(), "ZETA_URL": server.url, "ZETA_API_KEY": API_KEY, **variables}
    command = [str(ZETA), *(str(word) for word in words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_receipt_states_the_files_the_spec_and_the_data(http: httpx.Client, rows: Rows, client: Client) -> None:
    file_id = upload(http, "chats.txt")
    notify = [{"to": "https://example.org/confidential"}]
    job_id = trained_job(http, rows, dataset={"file": file_id}, entity_name="museum", notify=notify)
    receipt = http.get(f"/v1/jobs/{job_id}/receipt").json()
    assert receipt["payloadType"] == "application/vnd.in-toto+json"
    payload = base64.b64decode(receipt["payload"])
    assert b"confidential" not in payload
    statement = json.loads(payload)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    manifest = http.get(f"/v1/jobs/{job_id}/checkpoints/final").json()
    digests = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    assert digests.keys() == {*FILES, "manifest.json"}
    assert {file["path"]: file["sha256"] for file in manifest["files"]}.items() <= digests.items()
    predicate = statement["predicate"]
    assert (predicate["job"], predicate["name"], predicate["status"]) == (job_id, "museum", "succeeded")
    assert predicate["spec"]["dataset"] == {"file": file_id}
    stored = http.get(f"/v1/files/{file_id}").json()
    assert [(file["id"], file["sha256"]) for file in predicate["files"]] == [(file_id, stored["sha256"])]
    assert predicate["attempts"][0]["device_kind"] == "cpu:of attempt 1"
    assert http.get(f"/v1/jobs/{job_id}/receipt").json() == receipt, "it is signed once"


def test_a_receipt_is_signed_without_a_request(http: httpx.Client, rows: Rows) -> None:
    job_id = trained_job(http, rows)
    wait_until(lambda: rows.has_receipt(job_id), 10, "the receipt")


def test_a_job_with_an_invalid_base_blocks_no_other_receipt(http: httpx.Client, rows: Rows) -> None:
    """A taken-over run has reported a base that is not a checkpoint."""
    base = {"job": "job_../../files", "checkpoint": "../x"}
    invalid = rows.job(reported=ResolvedSpec.model_validate({"model": base}))
    rows.attempt(invalid)
    rows.checkpoint(invalid, "final", 4, FILES)
    rows.end(invalid, JobStatus.SUCCEEDED)
    valid = trained_job(http, rows)
    wait_until(lambda: rows.has_receipt(valid), 10, "the receipt of the other job")
    assert "receipts" not in http.get("/readyz").text
    refused = http.get(f"/v1/jobs/{invalid}/receipt")
    assert (refused.status_code, error_of(refused)["code"]) == (409, "receipt_not_signed")


@pytest.mark.extended
def test_a_downloaded_model_is_verified_without_a_server(
    server: ServerProcess, http: httpx.Client, rows: Rows, client: Client, tmp_path: Path
) -> None:
    job_id = trained_job(http, rows)
    receipt, key, model = tmp_path / "receipt.json", tmp_path / "key.pem", tmp_path / "model"
    receipt.write_text(zeta(server, "receipt", job_id).stdout)
    key.write_text(zeta(server, "receipt", "--key").stdout)
    client.download(job_id, directory=model)
    offline = {"ZETA_URL": "http://127.0.0.1:9", "ZETA_API_KEY": ""}
    verified = zeta(server, "verify", receipt, model, "--key", key, **offline)
    assert (verified.returncode, verified.stderr) == (0, "")
    assert verified.stdout.startswith(f"Verified: 3 files of checkpoint final of {job_id}")
    assert "The training state was not downloaded." in verified.stdout
    assert zeta(server, "verify", receipt, model).returncode == 0, "with the key of the server"

    (model / "model.safetensors").write_bytes(b"other weights")
    (model / "config.json").unlink()
    (model / "added.bin").write_bytes(b"")
    different = zeta(server, "verify", receipt, model, "--key", key, **offline)
    assert different.returncode == 1
    lines = different.stdout.splitlines()
    assert lines[0] == "config.json: missing"
    assert lines[1].startswith("model.safetensors: SHA-256 is ")
    assert lines[2] == "added.bin: not in the receipt"
    found = json.loads(zeta(server, "verify", receipt, model, "--key", key, "--json").stdout)
    assert (found["valid"], found["verified"], found["extra"]) == (False, 1, ["added.bin"])


def test_a_changed_receipt_or_another_key_is_refused(
    http: httpx.Client, rows: Rows, client: Client, tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    job_id = trained_job(http, rows)
    receipt, key = client.receipts.get(job_id), client.receipts.key().public_key
    changed = base64.b64decode(receipt.payload).replace(b'"succeeded"', b'"forged!!!"')
    forged = receipt.model_copy(update={"payload": base64.b64encode(changed).decode()})
    with pytest.raises(InvalidReceipt, match="the receipt was changed"):
        verify(forged, key, tmp_path)
    other = Ed25519PrivateKey.generate().public_key()
    pem = other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    with pytest.raises(InvalidReceipt, match="signed with another key"):
        verify(receipt, pem, tmp_path)


def test_a_job_without_an_end_or_a_checkpoint_has_no_receipt(http: httpx.Client, rows: Rows, client: Client) -> None:
    job_id = submit(http)["id"]
    with pytest.raises(Conflict, match="it has a receipt once it has ended"):
        client.receipts.get(job_id)
    client.cancel(job_id)
    with pytest.raises(NotFound, match="without a checkpoint, so there is no receipt"):
        client.receipts.get(job_id)


def test_the_lineage_of_a_file_follows_checkpoints(
    server: ServerProcess, http: httpx.Client, rows: Rows, client: Client
) -> None:
    file_id, other_id = upload(http, "first.txt"), upload(http, "second.txt")
    first = trained_job(http, rows, dataset={"file": file_id}, entity_name="first")
    model = {"job": first, "checkpoint": "final"}
    second = trained_job(http, rows, model=model, dataset={"file": other_id})
    third = trained_job(http, rows, model={"job": second, "checkpoint": "final"})
    trained_job(http, rows)
    uses = http.get(f"/v1/files/{file_id}/jobs").json()["data"]
    assert [(use["id"], use["base"]) for use in uses] == [(third, second), (second, first), (first, None)]
    assert uses[0]["checkpoints"] == ["final"]
    page = http.get(f"/v1/files/{file_id}/jobs", params={"limit": 2}).json()
    assert (page["has_more"], page["last_id"]) == (True, second)
    rest = http.get(f"/v1/files/{file_id}/jobs", params={"after": second}).json()["data"]
    assert [use["id"] for use in rest] == [first]
    assert [use.id for use in client.jobs_of_file(other_id)] == [third, second]
    seen = client.files_of_job(third)
    assert [(file.id, file.job) for file in seen.files] == [(other_id, second), (file_id, first)]
    assert (seen.bases, seen.deleted_jobs) == ([second, first], [])
    assert f"through {second}" in zeta(server, "lineage", file_id, COLUMNS="300").stdout
    assert "second.txt" in zeta(server, "lineage", third, COLUMNS="300").stdout


def test_a_deleted_file_is_still_found_by_its_jobs(http: httpx.Client, rows: Rows) -> None:
    file_id = upload(http, "deleted.txt")
    job_id = trained_job(http, rows, dataset={"file": file_id})
    http.delete(f"/v1/files/{file_id}").raise_for_status()
    assert [use["id"] for use in http.get(f"/v1/files/{file_id}/jobs").json()["data"]] == [job_id]
    missing = http.get(f"/v1/files/{file_id[:-1]}0/jobs" if file_id[-1] != "0" else f"/v1/files/{file_id[:-1]}1/jobs")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "file_not_found")
    response = http.get(f"/v1/files/{file_id}/jobs", params={"after": "job_00000000000000000000000a"})
    assert (response.status_code, error_of(response)["param"]) == (422, "after")


def test_a_spec_with_a_base_names_it_in_the_receipt(http: httpx.Client, rows: Rows) -> None:
    first = trained_job(http, rows)
    second = trained_job(http, rows, model={"job": first, "checkpoint": "final"}, dataset=SPEC["dataset"])
    payload = base64.b64decode(http.get(f"/v1/jobs/{second}/receipt").json()["payload"])
    predicate = json.loads(payload)["predicate"]
    assert predicate["base_checkpoint"] == f"{first}/final"
    assert len(predicate["base_manifest_sha256"]) == 64
