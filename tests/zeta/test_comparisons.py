"""The commands that compare jobs: plot and diff, in a pipe and as JSON."""

import json

import pytest

from tests.harness.service import Service
from tests.zeta.conftest import TINY_JOB
from zeta.cli.chart import Curve, draw_chart
from zeta.client import Client
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.job.job import Job
from zeta_core.contract.spec.differences import differing_settings
from zeta_core.contract.spec.resolved_spec import ResolvedSpec

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def waiting_job(client: Client) -> Job:
    """A job that never ran and has other settings than `finished_job`."""
    return client.cancel(client.submit({**TINY_JOB, "learning_rate": 0.5, "lora": {"r": 4}, "seq_len": 32}).id)


def test_diff_lists_the_settings_in_which_two_jobs_differ(
    service: Service, finished_job: Job, waiting_job: Job
) -> None:
    shown = service.command("diff", finished_job.id, waiting_job.id)
    assert shown.returncode == 0, shown.stderr
    rows = {line.split()[0]: line.split()[1:] for line in shown.stdout.splitlines()}
    assert (rows["A"], rows["B"]) == ([finished_job.id, "finished"], [waiting_job.id])
    assert rows["learning_rate"][1] == "0.5"
    assert rows["seq_len"] == ["64", "32"]
    assert rows["lora.r"] == ["-", "4"]
    assert not {"seed", "max_steps", "run_id", "dataset.builtin", "device"} & rows.keys()
    found = json.loads(service.command("diff", finished_job.id, waiting_job.id, "--json").stdout)
    assert found["settings"]["seq_len"] == [64, 32]
    same = service.command("diff", finished_job.id, finished_job.id)
    assert "have the same settings" in same.stdout


def test_uploaded_files_with_the_same_content_are_the_same_setting() -> None:
    def spec(file_id: str, sha256: str) -> ResolvedSpec:
        file = {"filename": "rows.jsonl", "sha256": sha256}
        return ResolvedSpec.model_validate({"dataset": [{"file": file_id}], "files": {file_id: file}, "seed": 1})

    assert differing_settings(spec("file_1", "a" * 64), spec("file_2", "a" * 64)) == {}
    differences = differing_settings(spec("file_1", "a" * 64), spec("file_2", "b" * 64))
    assert differences == {"dataset[0].file": (f"rows.jsonl ({'a' * 12})", f"rows.jsonl ({'b' * 12})")}


def test_plot_draws_the_curves_of_several_jobs_in_a_pipe(service: Service, finished_job: Job, waiting_job: Job) -> None:
    shown = service.command("plot", finished_job.id, waiting_job.id)
    assert shown.returncode == 0, shown.stderr
    assert "\x1b" not in shown.stdout
    assert "┌" in shown.stdout
    assert f"• {finished_job.id}  loss" in shown.stdout
    assert f"{waiting_job.id}  loss has no value yet" in shown.stdout
    curves = [json.loads(line) for line in service.command("plot", finished_job.id, "--json").stdout.splitlines()]
    assert [curve["job"] for curve in curves] == [finished_job.id]
    assert curves[0]["step"] == list(range(1, 9))


def test_plot_rejects_what_it_cannot_draw(service: Service, finished_job: Job, waiting_job: Job) -> None:
    unknown = service.command("plot", finished_job.id, "--metric", "los")
    assert (unknown.returncode, "grad_norm" in unknown.stderr) == (2, True)
    assert service.command("plot", finished_job.id, "--x", "hours").returncode == 2
    empty = service.command("plot", waiting_job.id)
    assert (empty.returncode, "No value of loss" in empty.stderr) == (2, True)
    assert service.command("plot").returncode == 2


def test_a_logarithmic_chart_needs_positive_values(capsys: pytest.CaptureFixture[str]) -> None:
    curve = Curve("job_1", "a", [1.0, 2.0], [0.0, 1.0])
    with pytest.raises(InvalidRequest, match="lowest loss is 0"):
        draw_chart([curve], "loss", "step", log_scale=True)
    draw_chart([curve, Curve("job_2", None, [1.0], [2.0])], "loss", "step", log_scale=False)
    shown = capsys.readouterr().out
    assert all(symbol in shown for symbol in ("• job_1  loss 1  a", "x job_2  loss 2", "step"))


def test_top_prints_the_state_once_without_a_terminal(service: Service, endless_job: Job) -> None:
    shown = service.command("top")
    assert shown.returncode == 0, shown.stderr
    assert endless_job.id in shown.stdout
    assert "DEVICE" in shown.stdout
    jobs, workers = (json.loads(line) for line in service.command("top", "--json").stdout.splitlines())
    assert endless_job.id in [job["id"] for job in jobs["data"]]
    assert workers["data"][0]["object"] == "worker"


@pytest.mark.extended
def test_compare_tells_a_difference_from_noise(service: Service, client: Client, finished_job: Job) -> None:
    short = {**TINY_JOB, "eval_split": 0.2, "max_steps": 20, "checkpointing_steps": 20}
    jobs = [client.submit({**short, "learning_rate": rate, "entity_name": f"at {rate}"}) for rate in (1e-6, 1e-2)]
    slow, fast = (client.wait(job.id, timeout_seconds=120) for job in jobs)
    shown = service.command("compare", slow.id, fast.id)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[1].startswith(f"A  {slow.id}  at 1e-06  ")
    assert "95 % interval" in shown.stdout
    assert f"B is better: {fast.id}" in shown.stdout
    found = json.loads(service.command("compare", slow.id, fast.id, "--json").stdout)
    assert found["better"] == "b"
    assert 0 < found["low"] < found["difference"] < found["high"]
    assert "not distinguishable" in service.command("compare", slow.id, slow.id).stdout
    none = service.command("compare", slow.id, finished_job.id)
    assert (none.returncode, "eval_split" in none.stderr) == (2, True), none.stderr
