"""Sweeps on the command line and with the client, with a real service."""

import json
from pathlib import Path

import pytest

from tests.harness.service import Service
from tests.harness.waiting import wait_until
from tests.zeta.conftest import ENDLESS_JOB, TINY_JOB
from zeta.client import Client
from zeta.spec_file import read_grid
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.job.status import ENDED

pytestmark = pytest.mark.timeout(300)


@pytest.mark.extended
def test_a_sweep_is_submitted_followed_and_shown_with_its_best_job(service: Service, tmp_path: Path) -> None:
    spec = tmp_path / "job.json"
    spec.write_text(json.dumps({**TINY_JOB, "max_steps": 3, "checkpointing_steps": 3, "eval_split": 0.2}))
    done = service.command("sweep", str(spec), "--grid", "learning_rate=1e-6,1e-2", "--follow", timeout_seconds=280)
    assert done.returncode == 0, done.stderr
    first, head, *rows, last = done.stdout.splitlines()
    sweep_id = first.split()[0]
    assert "has 2 jobs." in first
    assert head.split() == ["JOB", "LEARNING_RATE", "STATUS", "STEP", "EVAL"], "80 columns have no space for LOSS"
    (best,) = [row.split() for row in rows if row.endswith("best")]
    assert (best[1], best[2], best[3]) == ("0.01", "succeeded", "3/3")
    assert last == f"{best[0]} has the lowest held-out loss. Download it: zeta download {best[0]}"

    shown = json.loads(service.command("sweeps", sweep_id, "--json").stdout)
    assert (shown["best"], shown["num_jobs"]) == (best[0], {"succeeded": 2})
    assert f"{sweep_id}  learning_rate  2 succeeded" in service.command("sweeps").stdout
    ended = service.command("cancel", sweep_id)
    assert (ended.returncode, "have ended" in ended.stderr) == (1, True)


@pytest.mark.slow
def test_successive_halving_continues_the_better_of_two_real_runs(
    service: Service, client: Client, tmp_path: Path
) -> None:
    spec = tmp_path / "job.json"
    spec.write_text(json.dumps({**ENDLESS_JOB, "warmup_steps": 0}))
    submitted = service.command("sweep", str(spec), "--grid", "learning_rate=1e-9,1e-2", "--halving", "20")
    assert submitted.returncode == 0, submitted.stderr
    sweep_id = submitted.stdout.split()[0]
    worse, better = (job.id for job in client.sweeps.get(sweep_id).jobs)
    assert client.wait(worse, timeout_seconds=240).status_reason == "eliminated"
    wait_until(lambda: client.job(better).status == "running", 60, "the better job to continue")
    assert [attempt.reason for attempt in client.job(better).attempts] == ["waits_for_sweep", None]
    assert client.metrics(worse).step[-1] >= 20
    assert client.checkpoints(worse), "the checkpoint of its pause is kept"
    shown = service.command("sweeps", sweep_id).stdout
    assert "cancelled (eliminated)" in shown
    assert "compared at step" not in shown, "one job is left"
    client.sweeps.cancel(sweep_id)
    client.wait(better, timeout_seconds=60)


def test_cancel_with_the_id_of_a_sweep_cancels_its_jobs(service: Service, client: Client, endless_job: object) -> None:
    sweep = client.sweeps.create(TINY_JOB, {"seed": [1, 2, 3]}, random=2, seed=5)
    assert len(sweep.jobs) == 2
    cancelled = service.command("cancel", sweep.id)
    assert (cancelled.returncode, sweep.id in cancelled.stdout) == (0, True), cancelled.stderr
    for job in sweep.jobs:
        assert client.wait(job.id, timeout_seconds=60).status in ENDED
    assert sweep.id in [listed.id for listed in client.sweeps.list()]
    assert {job.status for job in client.sweeps.get(sweep.id).jobs} == {"cancelled"}


def test_a_grid_may_name_local_files(client: Client, text_file: Path, endless_job: object) -> None:
    with_data = {name: value for name, value in TINY_JOB.items() if name != "dataset"}
    sweep = client.sweeps.create(with_data, {"dataset": [str(text_file), "python-docs"]})
    client.sweeps.cancel(sweep.id)
    assert [job.settings["dataset"] for job in sweep.jobs] == [
        {"file": client.upload(text_file).id},
        {"builtin": "python-docs"},
    ]
    with pytest.raises(InvalidRequest, match=r"learning_rate=-1\.0 is invalid"):
        client.sweeps.create(TINY_JOB, {"learning_rate": [0.1, -1.0]})


def test_a_grid_is_read_as_lists_of_yaml_values() -> None:
    assert read_grid(["learning_rate=1e-4,3e-4", "lora.target_modules=[q, v],all-linear"]) == {
        "learning_rate": [1e-4, 3e-4],
        "lora.target_modules": [["q", "v"], "all-linear"],
    }
    for options in (["seed"], ["seed="], ["=1"], ["seed=1", "seed=2"], ["seed=[1"]):
        with pytest.raises(InvalidRequest):
            read_grid(options)


def test_a_sweep_without_a_grid_is_rejected(service: Service) -> None:
    done = service.command("sweep", "--model", "org/name", "--data", "python-docs")
    assert (done.returncode, "--grid" in done.stderr) == (2, True)
    factor = service.command(
        "sweep", "--model", "org/name", "--data", "python-docs", "--grid", "seed=1,2", "--halving-factor", "3"
    )
    assert (factor.returncode, "--halving-factor needs --halving" in factor.stderr) == (2, True)
    done = service.command("sweeps", "--follow")
    assert (done.returncode, "--follow needs the id" in done.stderr) == (2, True)
