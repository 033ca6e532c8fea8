"""Sweeps over HTTP: all jobs or none, the result table, and cancelling."""

from typing import Any

import httpx
import pytest

from tests.server.rows import Rows
from tests.server.server_process import SPEC, ServerProcess, error_of, submit
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.job.sweep import SweepRequest, with_settings

GRID: dict[str, Any] = {"learning_rate": [1e-4, 3e-4], "lora.r": [4, 8, 16]}


def create(http: httpx.Client, *, key: str = "", **fields: Any) -> httpx.Response:
    body = {"spec": SPEC, "grid": GRID, **fields}
    return http.post("/v1/sweeps", json=body, headers={"Idempotency-Key": key} if key else {})


def num_jobs(http: httpx.Client) -> int:
    return len(http.get("/v1/jobs", params={"limit": 1000}).json()["data"])


def test_a_sweep_creates_a_job_for_each_combination_of_its_grid(http: httpx.Client) -> None:
    response = create(http)
    assert response.status_code == 201, response.text
    sweep = response.json()
    assert response.headers["location"] == f"/v1/sweeps/{sweep['id']}"
    settings = [tuple(job["settings"].values()) for job in sweep["jobs"]]
    assert settings == [(rate, rank) for rate in (1e-4, 3e-4) for rank in (4, 8, 16)]
    assert (sweep["fields"], sweep["num_jobs"], sweep["best"]) == (list(GRID), {"queued": 6}, None)
    for listed in sweep["jobs"]:
        job = http.get(f"/v1/jobs/{listed['id']}").json()
        assert job["sweep"] == sweep["id"]
        assert job["resolved_spec"]["learning_rate"] == listed["settings"]["learning_rate"]
        assert job["spec"] == {**SPEC, "learning_rate": job["spec"]["learning_rate"], "lora": job["spec"]["lora"]}
    assert http.get(f"/v1/sweeps/{sweep['id']}").json() == sweep


def test_an_invalid_combination_creates_no_job_and_is_named(http: httpx.Client) -> None:
    before = num_jobs(http)
    error = error_of(create(http, grid={"learning_rate": [1e-4], "lora.r": [4, 0]}))
    assert "The job with learning_rate=0.0001, lora.r=0 is invalid" in error["message"]
    assert error["param"] == "lora.r"
    missing = error_of(create(http, spec={**SPEC, "dataset": {"file": "file_01k9missing000000000000000"}}))
    assert missing["code"], "a reference is checked in the transaction"
    assert num_jobs(http) == before
    assert error_of(create(http, spec={**SPEC, "dataset": "x"}, grid={"dataset.file": ["y"]}))["param"] == "grid"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"grid": {}}, "grid"),
        ({"grid": {"seed": []}}, "grid.seed"),
        ({"grid": {"seed": [1, 1]}}, "grid.seed"),
        ({"grid": {"a..b": [1]}}, "grid.a..b"),
        ({"grid": {"seed": list(range(101))}}, "grid"),
        ({"random": 7}, "random"),
        ({"random": 101}, "random"),
        ({"seed": 1}, "seed"),
        ({"method": "bayes"}, "method"),
    ],
)
def test_an_invalid_sweep_is_rejected(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    response = create(http, **fields)
    assert response.status_code == 422, response.text
    assert error_of(response)["param"] == param


def test_a_random_choice_has_distinct_combinations_and_is_repeatable() -> None:
    grid = {f"f{number}": list(range(10)) for number in range(8)}
    request = SweepRequest.model_validate({"spec": {}, "grid": grid, "random": 50, "seed": 3})
    chosen = request.combinations()
    assert chosen == request.combinations()
    assert len({tuple(settings.values()) for settings in chosen}) == 50
    assert chosen != request.model_copy(update={"seed": 4}).combinations()


def test_settings_change_only_their_fields() -> None:
    spec = {"lora": {"r": 4, "lora_alpha": 8}, "seed": 1}
    assert with_settings(spec, {"lora.r": 16, "optim.beta": 1}) == {
        "lora": {"r": 16, "lora_alpha": 8},
        "seed": 1,
        "optim": {"beta": 1},
    }
    assert spec["lora"] == {"r": 4, "lora_alpha": 8}


def test_a_repeated_request_with_its_key_creates_one_sweep(http: httpx.Client) -> None:
    first = create(http, key="sweep-once")
    again = create(http, key="sweep-once")
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    other = error_of(create(http, key="sweep-once", random=2))
    assert (other["code"], first.json()["id"] in other["message"]) == ("idempotency_key_reused", True)


def test_the_best_job_has_the_lowest_loss_on_held_out_data(rows: Rows, http: httpx.Client) -> None:
    sweep = create(http, grid={"learning_rate": [1e-4, 3e-4, 1e-3]}).json()
    ids = [job["id"] for job in sweep["jobs"]]
    for job_id, loss, eval_loss in zip(ids, (3.0, 2.0, 1.0), (2.5, 2.1, 2.4), strict=True):
        rows.attempt(job_id, to=JobStatus.SUCCEEDED)
        rows.change(job_id, progress={"recent_loss": loss, "eval_loss": eval_loss, "step": 4})
    found = http.get(f"/v1/sweeps/{sweep['id']}").json()
    assert (found["metric"], found["best"], found["num_jobs"]) == ("eval_loss", ids[1], {"succeeded": 3})
    rows.change(ids[0], progress={"recent_loss": 3.0})
    found = http.get(f"/v1/sweeps/{sweep['id']}").json()
    assert (found["metric"], found["best"]) == ("loss", ids[2]), "a job without held-out data can't be compared by it"


def test_cancelling_a_sweep_cancels_its_unfinished_jobs(rows: Rows, http: httpx.Client) -> None:
    sweep = create(http).json()
    first, second = (job["id"] for job in sweep["jobs"][:2])
    rows.attempt(first, to=JobStatus.SUCCEEDED)
    rows.attempt(second)
    other = submit(http)["id"]
    response = http.post(f"/v1/sweeps/{sweep['id']}/cancel")
    assert (response.status_code, response.json()["num_jobs"]) == (202, {"succeeded": 1, "running": 1, "cancelled": 4})
    assert http.get(f"/v1/jobs/{second}").json()["requested_action"] == "cancel"
    assert http.get(f"/v1/jobs/{other}").json()["status"] == "queued"
    rows.change(second, status=JobStatus.CANCELLED, requested_action=None)
    assert error_of(http.post(f"/v1/sweeps/{sweep['id']}/cancel"))["code"] == "sweep_ended"


def test_sweeps_are_listed_newest_first_and_only_in_their_project(
    server: ServerProcess, rows: Rows, http: httpx.Client
) -> None:
    ids = [create(http, grid={"seed": [number]}).json()["id"] for number in range(3)]
    page = http.get("/v1/sweeps", params={"limit": 2}).json()
    assert [sweep["id"] for sweep in page["data"]] == ids[:0:-1]
    rest = http.get("/v1/sweeps", params={"limit": 2, "after": page["last_id"]}).json()
    assert rest["data"][0]["id"] == ids[0]
    rows.key("key-of-another-project", project="other", scopes=["submit"])
    with server.http("key-of-another-project") as stranger:
        assert stranger.get("/v1/sweeps").json()["data"] == []
        assert stranger.get(f"/v1/sweeps/{ids[0]}").status_code == 404
        assert stranger.post(f"/v1/sweeps/{ids[0]}/cancel").status_code == 404
