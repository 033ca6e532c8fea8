"""A backup of a running service, restored beside it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.specs import as_jsonl, tiny_job
from tests.harness.service import running_service, wait_for_end
from tests.harness.waiting import wait_until


@pytest.mark.slow
def test_a_restored_service_continues_a_paused_job_beside_the_original(tmp_path: Path) -> None:
    backup, home = tmp_path / "backup", tmp_path / "restored"
    with running_service(tmp_path / "original") as original, original.http() as http:
        upload = http.post(
            "/v1/files",
            files={"file": ("data.jsonl", as_jsonl("All the world's a stage.\n\n" * 200))},
            data={"purpose": "dataset"},
        )
        spec = tiny_job(dataset={"file": upload.json()["id"]}, epochs=None, max_steps=1500, checkpointing_steps=500)
        job_id = http.post("/v1/jobs", json=spec).raise_for_status().json()["id"]

        def job_now() -> dict[str, Any]:
            return http.get(f"/v1/jobs/{job_id}").raise_for_status().json()

        wait_until(lambda: bool((job_now()["progress"] or {}).get("step")), 90, "a step")
        http.post(f"/v1/jobs/{job_id}/pause").raise_for_status()
        wait_until(lambda: job_now()["status"] == "paused", 60, "the job to be paused")
        saved = original.command("backup", str(backup), "--json")
        assert saved.returncode == 0, saved.stderr
        assert json.loads(saved.stdout)["checkpoints"] >= 1
        restored = original.command("restore", str(backup), "--home", str(home))
        assert restored.returncode == 0, restored.stderr
        assert "Restored the database and 1 job" in restored.stdout
        with running_service(home) as second, second.http() as other:
            assert other.get(f"/v1/jobs/{job_id}").json()["status"] == "paused"
            other.post(f"/v1/jobs/{job_id}/resume").raise_for_status()
            job = wait_for_end(other, job_id)
            assert job["status"] == "succeeded", second.log()
            assert job["attempts"][1]["first_step"] > 1, "it continued from its checkpoint"
            downloaded = second.command("download", job_id, "-o", str(tmp_path / "final"))
            assert downloaded.returncode == 0, downloaded.stderr
        assert job_now()["status"] == "paused", "the original has not changed"
