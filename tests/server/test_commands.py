"""Cancel, pause, resume, rerun and delete over HTTP follow the table of commands."""

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.rows import Rows
from tests.server.server_process import SPEC, ServerProcess, error_of, running_server, submit
from zeta_core.contract.job.checkpoint import FileRole
from zeta_core.contract.job.commands import COMMAND_TABLE, COMMANDS, Accepted, Situation, as_markdown
from zeta_core.contract.job.status import JobStatus, StatusReason
from zeta_core.contract.wire.run_directory import job_key, log_key

WEIGHTS: dict[str, tuple[FileRole, bytes]] = {
    "model.safetensors": ("weights", b"w"),
    "training_state/optimizer.pt": ("state", b"s"),
}


def events_of(http: httpx.Client, job_id: str) -> list[dict[str, Any]]:
    found = http.get(f"/v1/jobs/{job_id}/events", params={"limit": 1000}).json()["data"]
    assert [event["seq"] for event in found] == list(range(1, len(found) + 1))
    return found


def job_in(rows: Rows, situation: Situation, **spec: Any) -> str:
    """Create a job in one of the table's situations."""
    job_id = rows.job(spec=spec)
    match situation:
        case Situation.QUEUED:
            pass
        case Situation.CANCELLED:
            rows.attempt(job_id, to=JobStatus.CANCELLED)
        case Situation.RUNNING:
            rows.attempt(job_id)
        case Situation.PAUSING | Situation.CANCELLING | Situation.PAUSING_FOR_SWEEP:
            actions = {Situation.PAUSING: "pause", Situation.CANCELLING: "cancel"}
            rows.attempt(job_id)
            rows.change(job_id, requested_action=actions.get(situation, "wait_for_sweep"))
        case Situation.PAUSED:
            rows.attempt(job_id, to=JobStatus.PAUSED, reason=StatusReason.PAUSED_BY_USER)
        case Situation.PAUSED_FOR_DISK:
            rows.attempt(job_id, to=JobStatus.PAUSED, reason=StatusReason.DISK_FULL)
        case Situation.PAUSED_FOR_SWEEP:
            rows.attempt(job_id, to=JobStatus.PAUSED, reason=StatusReason.WAITS_FOR_SWEEP)
        case Situation.SUCCEEDED | Situation.FAILED:
            rows.attempt(job_id, to=JobStatus(situation.value))
    return job_id


# The job after an accepted command: status, status_reason, requested_action, and the code of waiting_reason.
CANCELLED = ("cancelled", "cancelled_by_user", None, None)
PAUSED = ("paused", "paused_by_user", None, "paused")
QUEUED = ("queued", "resumed", None, "no_worker")
LEFT: dict[Situation, dict[str, tuple[str, str | None, str | None, str | None]]] = {
    Situation.QUEUED: {"cancel": CANCELLED, "pause": PAUSED},
    Situation.RUNNING: {
        "cancel": ("running", None, "cancel", None),
        "pause": ("running", None, "pause", None),
        "checkpoint": ("running", None, None, None),
    },
    Situation.PAUSING: {
        "cancel": ("running", None, "cancel", None),
        "pause": ("running", None, "pause", None),
        "resume": ("running", None, None, None),
        "checkpoint": ("running", None, "pause", None),
    },
    Situation.PAUSING_FOR_SWEEP: {
        "cancel": ("running", None, "cancel", None),
        "pause": ("running", None, "pause", None),
        "checkpoint": ("running", None, "wait_for_sweep", None),
    },
    Situation.PAUSED_FOR_SWEEP: {"cancel": CANCELLED},
    Situation.CANCELLING: {"cancel": ("running", None, "cancel", None)},
    Situation.PAUSED: {"cancel": CANCELLED, "resume": QUEUED},
    Situation.PAUSED_FOR_DISK: {"cancel": CANCELLED, "pause": PAUSED, "resume": QUEUED},
}


@pytest.mark.parametrize("situation", list(Situation))
def test_every_command_in_every_situation_follows_the_table(
    rows: Rows, http: httpx.Client, situation: Situation
) -> None:
    for command in COMMANDS:
        job_id = job_in(rows, situation)
        before = http.get(f"/v1/jobs/{job_id}").json()
        response = (
            http.delete(f"/v1/jobs/{job_id}") if command == "delete" else http.post(f"/v1/jobs/{job_id}/{command}")
        )
        expected = COMMAND_TABLE[situation][command]
        where = f"{command} of a job that is {situation}: {response.text}"
        if isinstance(expected, Accepted):
            assert response.status_code == expected.status, where
            job = response.json()
            if command == "delete":
                assert job == {"id": job_id, "object": "job", "deleted": True}
            elif command == "rerun":
                assert (job["parent"], job["status"], job["spec"]) == (job_id, "queued", before["spec"])
                assert response.headers["location"] == f"/v1/jobs/{job['id']}"
            else:
                code = (job["waiting_reason"] or {}).get("code")
                left = (job["status"], job["status_reason"], job["requested_action"], code)
                assert left == LEFT[situation][command], where
                assert job["checkpoint_requested"] == (command == "checkpoint")
        else:
            assert response.status_code == 409, where
            assert (error_of(response)["code"], error_of(response)["type"]) == (expected.code, "conflict_error")
            assert job_id in error_of(response)["message"]
            now = http.get(f"/v1/jobs/{job_id}").json()
            assert {**now, "waiting_reason": None} == {**before, "waiting_reason": None}
        if command != "delete" or not isinstance(expected, Accepted):
            events_of(http, job_id)


def test_the_documentation_shows_the_table() -> None:
    assert as_markdown() in (Path(__file__).parents[2] / "docs" / "commands.md").read_text()


def test_a_job_without_time_left_is_not_resumed(rows: Rows, http: httpx.Client) -> None:
    job_id = job_in(rows, Situation.PAUSED, time_limit_seconds=1)  # its attempt started long ago
    error = error_of(http.post(f"/v1/jobs/{job_id}/resume"))
    assert error["code"] == "time_limit_used"
    assert "time_limit_seconds" in error["message"]


# --- Rerun ------------------------------------------------------------------------------------------------------------


def rerun(http: httpx.Client, job_id: str, /, key: str = "", **body: Any) -> httpx.Response:
    return http.post(f"/v1/jobs/{job_id}/rerun", json=body, headers={"Idempotency-Key": key} if key else {})


def at(name: str) -> dict[str, Any]:
    """The field ``from``, which is a reserved word in Python."""
    return {"from": name}


def test_a_rerun_creates_a_job_from_the_patched_spec_once_per_key(http: httpx.Client) -> None:
    parent = submit(http, metadata={"a": "1", "b": "2"}, learning_rate=0.5)
    patch = {"metadata": {"a": None, "c": "3"}, "learning_rate": None, "max_steps": 9}
    response = rerun(http, parent["id"], key="again", patch=patch)
    job = response.json()
    assert (response.status_code, job["parent"]) == (201, parent["id"])
    assert job["spec"] == {**SPEC, "max_steps": 9, "metadata": {"b": "2", "c": "3"}}
    assert job["metadata"] == {"b": "2", "c": "3"}
    replayed = rerun(http, parent["id"], key="again", patch=patch)
    assert (replayed.json()["id"], replayed.headers["idempotent-replayed"]) == (job["id"], "true")
    assert error_of(rerun(http, parent["id"], key="again", patch={}))["code"] == "idempotency_key_reused"
    assert http.post(f"/v1/jobs/{parent['id']}/rerun").json()["spec"] == parent["spec"]
    assert rerun(http, "job_00000000000000000000").status_code == 404


def test_errors_of_a_rerun_name_the_invalid_fields(http: httpx.Client) -> None:
    parent = submit(http)["id"]
    response = rerun(http, parent, patch={"batch_size": 0, "lerning_rate": 1})
    assert response.status_code == 422
    assert {detail["param"] for detail in error_of(response)["details"]} == {"batch_size", "lerning_rate"}
    bad: tuple[tuple[dict[str, Any], str, str | None], ...] = (
        ({"form": "latest"}, "form", "from"),
        ({"from": "newest"}, "from", None),
        ({"patch": [1]}, "patch", None),
        ({"from": "latest"}, "from", None),  # it has no checkpoint
        ({"from": "step-3"}, "from", None),
        ({"patch": {"resume_from_checkpoint": parent}}, "patch.resume_from_checkpoint", None),
    )
    for body, param, suggestion in bad:
        response = rerun(http, parent, **body)
        assert (response.status_code, error_of(response)["param"]) == (422, param), response.text
        assert error_of(response)["details"][0]["suggestion"] == suggestion


def job_with_checkpoints(rows: Rows, spec: dict[str, Any] | None = None) -> str:
    """A job with the checkpoints ``step-4``, ``step-8`` and ``best``."""
    job_id = rows.job(spec=spec)
    rows.attempt(job_id)
    rows.checkpoint(job_id, "best", 9, WEIGHTS)
    rows.checkpoint(job_id, "step-4", 4, WEIGHTS)
    rows.checkpoint(job_id, "step-8", 8, WEIGHTS)
    return job_id


def test_a_rerun_continues_from_the_checkpoint_that_it_names(rows: Rows, http: httpx.Client) -> None:
    parent = job_with_checkpoints(rows)
    for named, meant in (("latest", "step-8"), ("step-4", "step-4")):
        job = rerun(http, parent, patch={"max_steps": 50, "priority": 3}, **at(named)).json()
        assert job["spec"]["resume_from_checkpoint"] == f"{parent}/{meant}"
        assert job["resolved_spec"]["device_kind"] == "cpu:of attempt 1"  # the kind that computed the checkpoint
        from_start = rerun(http, job["id"]).json()
        assert "resume_from_checkpoint" not in from_start["spec"], "a rerun from the start uses no checkpoint"
    assert http.get(f"/v1/jobs/{parent}").json()["attempts"][0]["device_kind"] == "cpu:of attempt 1"


def test_a_rerun_from_a_checkpoint_may_change_only_resumable_fields(rows: Rows, http: httpx.Client) -> None:
    parent = job_with_checkpoints(rows, {"batch_size": 4, "gradient_accumulate_every": 2, "learning_rate": 0.001})
    same = {"batch_size": 2, "gradient_accumulate_every": 4, "save_total_limit": 9, "epochs": 2, "max_steps": None}
    assert rerun(http, parent, patch=same, **at("latest")).status_code == 201
    patch = {
        "learning_rate": 0.002,
        "seed": 1,
        "batch_size": 16,
        "use_fsdp": True,
        "dataset": [SPEC["dataset"], SPEC["dataset"]],
    }
    response = rerun(http, parent, patch=patch, **at("latest"))
    assert response.status_code == 422
    details = {detail["param"]: detail for detail in error_of(response)["details"]}
    assert details.keys() == patch.keys()
    for detail in details.values():
        assert detail["code"] == "changed_on_resume"
        assert '"from": "start"' in detail["message"]
        assert f'"model": {{"job": "{parent}", "checkpoint": "step-8"}}' in detail["message"]
    assert "0.002" in details["learning_rate"]["message"]
    assert "0.001" in details["learning_rate"]["message"]
    # The fixes work, and the same rules hold for a plain submission.
    assert rerun(http, parent, patch=patch).status_code == 201
    weights = {"model": {"job": parent, "checkpoint": "step-8"}}
    assert rerun(http, parent, patch={**patch, **weights}).status_code == 201
    plain = {**SPEC, "resume_from_checkpoint": parent, "learning_rate": 0.002}
    assert error_of(http.post("/v1/jobs", json=plain))["code"] == "changed_on_resume"


def test_another_form_of_the_same_value_is_not_a_change_on_resume(rows: Rows, http: httpx.Client) -> None:
    parent = job_with_checkpoints(rows)
    # The worker recorded the adapter in a shorter form.
    rows.change(parent, spec={**SPEC, "lora": {"r": 8}}, resolved_spec_json={**SPEC, "lora": {"r": 8}, "files": {}})
    assert rerun(http, parent, **at("latest")).status_code == 201
    assert rerun(http, parent, patch={"lora": {"save_merged": True}}, **at("latest")).status_code == 201
    assert error_of(rerun(http, parent, patch={"lora": {"r": 4}}, **at("latest")))["param"] == "lora"
    rows.change(parent, spec={**SPEC, "use_deepspeed": True}, resolved_spec_json={**SPEC, "use_deepspeed": True})
    assert rerun(http, parent, patch={"use_deepspeed": 2}, **at("latest")).status_code == 201
    assert error_of(rerun(http, parent, patch={"use_deepspeed": 3}, **at("latest")))["param"] == "use_deepspeed"


def test_the_evaluation_schedule_must_not_change_on_resume(rows: Rows, http: httpx.Client) -> None:
    """It affects the best checkpoint and early stopping."""
    parent = job_with_checkpoints(rows)
    evaluated = {**SPEC, "eval_split": 0.1, "eval_steps": 5, "early_stopping_patience": 3}
    rows.change(parent, spec=evaluated, resolved_spec_json={**evaluated, "files": {}})
    response = rerun(http, parent, patch={"eval_steps": 10, "early_stopping_patience": 4}, **at("latest"))
    assert {detail["param"] for detail in error_of(response)["details"]} == {"eval_steps", "early_stopping_patience"}


# --- Delete -----------------------------------------------------------------------------------------------------------


def test_deleting_a_job_removes_its_artifacts_and_rows(server: ServerProcess, rows: Rows, http: httpx.Client) -> None:
    key = {"Idempotency-Key": "of a job that is deleted"}
    job_id = http.post("/v1/jobs", json=SPEC, headers=key).json()["id"]
    rows.attempt(job_id, log="a line\n", progress=[{"phase": "training", "step": 1}], to=JobStatus.SUCCEEDED)
    rows.checkpoint(job_id, "final", 4, WEIGHTS)
    folder = server.settings.artifacts / job_key(job_id)
    assert (server.settings.artifacts / log_key(job_id, 1)).is_file()
    assert http.delete(f"/v1/jobs/{job_id}").json() == {"id": job_id, "object": "job", "deleted": True}
    assert not folder.exists()
    for path in ("", "/events", "/logs", "/metrics", "/checkpoints", "/checkpoints/final"):
        assert http.get(f"/v1/jobs/{job_id}{path}").status_code == 404
    assert http.delete(f"/v1/jobs/{job_id}").status_code == 404
    assert job_id not in [job["id"] for job in http.get("/v1/jobs", params={"limit": 1000}).json()["data"]]
    assert error_of(http.post("/v1/jobs", json={**SPEC, "resume_from_checkpoint": job_id}))["code"] == "job_not_found"
    again = http.post("/v1/jobs", json=SPEC, headers=key)
    assert (again.status_code, again.json()["id"] != job_id) == (201, True)


def test_a_job_in_use_by_an_unfinished_job_is_not_deleted(rows: Rows, http: httpx.Client) -> None:
    parent = rows.job()
    rows.attempt(parent, to=JobStatus.SUCCEEDED)
    rows.checkpoint(parent, "step-4", 4, WEIGHTS)
    for needs in (
        lambda: rerun(http, parent).json(),
        lambda: submit(http, resume_from_checkpoint=parent),
        lambda: submit(http, model={"job": parent, "checkpoint": "step-4"}),
    ):
        other = needs()["id"]
        response = http.delete(f"/v1/jobs/{parent}")
        assert (response.status_code, error_of(response)["code"]) == (409, "job_in_use")
        assert other in error_of(response)["message"]
        assert http.post(f"/v1/jobs/{other}/cancel").status_code == 202
    assert http.delete(f"/v1/jobs/{parent}").status_code == 200


@pytest.mark.extended
def test_an_interrupted_deletion_is_finished_at_the_next_start(shared_valkey: ValkeyServer, tmp_path: Path) -> None:
    with running_server(tmp_path / "home", shared_valkey.url) as server, server.http() as http:
        rows = Rows(server.settings)
        job_id = rows.job()
        rows.attempt(job_id, log="a line\n", to=JobStatus.FAILED)
        folder = server.settings.artifacts / job_key(job_id)
        jobs, aside = folder.parent, folder.parent.with_name("aside")
        jobs.rename(aside)
        jobs.write_text("")  # nothing can be removed below a file, so the artifacts remain for now
        assert http.delete(f"/v1/jobs/{job_id}").status_code == 200
        assert http.get(f"/v1/jobs/{job_id}").status_code == 404
        assert "cannot be removed now" in server.log()
        jobs.unlink()
        aside.rename(jobs)
        server.end(signal.SIGKILL)
        server.start()
        wait_until(lambda: not rows.has_job(job_id), 20, "the rows to be gone")
        assert not folder.exists()


# --- Drain ------------------------------------------------------------------------------------------------------------


def test_only_an_admin_can_drain_an_existing_worker(server: ServerProcess, rows: Rows, http: httpx.Client) -> None:
    assert error_of(http.post("/v1/workers/nobody/drain"))["code"] == "worker_not_found"
    rows.key("no-admin")
    with server.http("no-admin") as other:
        response = other.post("/v1/workers/nobody/drain")
    assert (response.status_code, error_of(response)["code"]) == (403, "insufficient_scope")
