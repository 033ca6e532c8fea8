"""The worker with the real training core: ``python -m zeta_core RUN_DIR`` as it is launched in production."""

import psutil
import pytest

from tests.end_to_end.specs import tiny_job
from tests.harness.fleet import SmallFleet
from tests.harness.service import processes_of_job
from tests.harness.waiting import wait_until
from zeta_core.contract.job.checkpoint import checkpoint_step
from zeta_core.contract.wire.run_directory import tensorboard_key


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_stopping_worker_hands_its_real_run_back_and_it_is_completed(fleet: SmallFleet) -> None:
    first = fleet.start_worker(small=False, ZETA_STOP_GRACE_SECONDS="30")
    job_id = fleet.submit(spec=tiny_job(max_steps=200, checkpointing_steps=100, report_to=["tensorboard"]))
    fleet.wait_for_step(job_id, 5, 120)
    first.terminate()
    assert first.wait(60) == 0, fleet.logs()
    job = fleet.job(job_id)
    assert (job.status, job.status_reason) == ("queued", "handed_back"), fleet.logs()
    assert len(fleet.checkpoints(job_id)) >= 1
    fleet.start_worker(small=False)
    job = fleet.wait_for_status(job_id, "succeeded", 120)
    one, two = fleet.attempts(job_id)
    assert (one.last_step or 0) < (two.first_step or 0) <= 200
    assert two.last_step == 200
    assert job.result is not None
    assert job.result["tokens"] > 0
    assert {"final", "step-200"} <= set(fleet.checkpoints(job_id))
    curves = list((fleet.settings.artifacts / tensorboard_key(job_id)).rglob("events.out.*"))
    assert len(curves) == 2, "one for each attempt, kept after its output directory is removed"
    fleet.check_events(job_id)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_warns_on_another_device_kind_and_an_exact_job_waits(fleet: SmallFleet) -> None:
    """The second worker passes variables to its runs that select other kernels."""
    first = fleet.start_worker("first", small=False, ZETA_STOP_GRACE_SECONDS="30", ZETA_WORKER_SLOTS="2")
    exact, free = (
        fleet.submit(spec=tiny_job(max_steps=300, checkpointing_steps=300, resources={"exact": exact}))
        for exact in (True, False)
    )
    fleet.wait_for_step(exact, 5, 120)
    fleet.wait_for_step(free, 5, 120)
    first.terminate()
    assert first.wait(60) == 0, fleet.logs()
    fleet.start_worker("second", small=False, ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE")
    job = fleet.wait_for_status(free, "succeeded", 120)
    one, two = fleet.attempts(free)
    (warning,) = [warning for warning in job.warnings if warning["code"] == "device_changed"]
    assert one.device_kind != two.device_kind == job.resolved_spec["device_kind"]
    assert (
        f"runs on {two.device_kind}, and the attempt that it continues ran on {one.device_kind}." in warning["message"]
    )

    reason = fleet.job(exact).waiting_reason or {}
    assert (reason["code"], reason["details"]) == ("never_fits", {"device_kind": one.device_kind})
    assert "(resources.exact is true)" in reason["message"]
    fleet.start_worker("third", small=False)
    job = fleet.wait_for_status(exact, "succeeded", 120)
    assert [attempt.worker for attempt in fleet.attempts(exact)] == ["first", "third"]
    assert "device_changed" not in [warning["code"] for warning in job.warnings]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_or_stalled_rank_ends_the_attempt_and_all_ranks_can_be_stopped(fleet: SmallFleet) -> None:
    """Four attempts of one job on two processes. Each ends with a different fault; the next one continues."""
    fleet.start_worker(small=False, ZETA_STOP_GRACE_SECONDS="30", ZETA_STALL_MIN_SECONDS="5", ZETA_STALL_FACTOR="5")
    spec = tiny_job(max_steps=1_000_000, checkpointing_steps=20, resources={"processes": 2})
    job_id = fleet.submit(spec=spec)

    def wait_for_attempt(attempt: int) -> dict[str, psutil.Process]:
        """Wait until the attempt has saved some steps; returns its processes by rank (``""``: the launcher)."""
        wait_until(lambda: fleet.job(job_id).attempt == attempt, 60, f"attempt {attempt}")
        wait_until(lambda: fleet.attempts(job_id)[-1].first_step, 100, "a step")
        first = fleet.attempts(job_id)[-1].first_step or 0
        wait_until(lambda: newest_of(fleet, job_id) > first + 20, 60, "a checkpoint")
        return {process.environ().get("RANK", ""): process for process in map(psutil.Process, processes_of_job(job_id))}

    ranks = wait_for_attempt(1)
    assert sorted(ranks) == ["", "0", "1"]
    ranks["1"].kill()
    wait_for_attempt(2)["1"].suspend()
    ranks = wait_for_attempt(3)
    saved = newest_of(fleet, job_id)
    ranks[""].terminate()
    wait_for_attempt(4)
    fleet.request(job_id, "pause")
    job = fleet.wait_for_status(job_id, "paused", 60)

    one, two, three, four = fleet.attempts(job_id)
    assert [attempt.reason for attempt in (one, two, three, four)] == [
        "process_killed",
        "stalled",
        "handed_back",
        "paused_by_user",
    ]
    lost = (one.last_step or 0) + 1 - (two.first_step or 0)
    assert 0 <= lost <= 40, "at most one interval, and the steps trained while a checkpoint is written"
    assert four.first_step == (three.last_step or 0) + 1 > saved, "no step is lost by SIGTERM"
    (warning,) = [warning for warning in job.warnings if warning["code"] == "stalled"]
    assert "stacks of process" in warning["message"]
    assert "rank 0" in warning["message"]
    assert "No response from rank 1" in warning["message"]
    assert "train/loop.py" in warning["stacks"]
    assert not processes_of_job(job_id)
    fleet.check_events(job_id)


def newest_of(fleet: SmallFleet, job_id: str) -> int:
    return max((checkpoint_step(name) or 0 for name in fleet.checkpoints(job_id)), default=0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_of_four_processes_takes_four_slots_and_survives_kills(fleet: SmallFleet) -> None:
    """It is killed once as a rank, once as a whole, and resumed; then it runs on a worker with fewer slots."""
    fleet.start_worker("wide", small=False, ZETA_STOP_GRACE_SECONDS="30", ZETA_WORKER_SLOTS="5")
    spec = tiny_job(max_steps=1_000_000, checkpointing_steps=20, batch_size=1, resources={"processes": 4})
    job_id = fleet.submit(spec=spec)

    def ranks_after(step: int) -> dict[str, psutil.Process]:
        """The processes by rank, once the job has passed this step and saved it."""
        wait_until(lambda: newest_of(fleet, job_id) >= step, 200, f"the checkpoint of step {step}")
        return {process.environ().get("RANK", ""): process for process in map(psutil.Process, processes_of_job(job_id))}

    ranks = ranks_after(10)
    assert sorted(ranks) == ["", "0", "1", "2", "3"]
    assert fleet.job(job_id).slots == [0, 1, 2, 3]
    assert {rank.environ()["OMP_NUM_THREADS"] for rank in ranks.values()} <= {"1", "4"}
    narrow = fleet.submit(spec=tiny_job(max_steps=1))
    fleet.wait_for_status(narrow, "succeeded", 120)
    ranks["2"].kill()
    for process in ranks_after(newest_of(fleet, job_id) + 20).values():
        process.kill()
    wait_until(lambda: fleet.job(job_id).attempt == 3, 100, "the third attempt")
    saved = newest_of(fleet, job_id)
    fleet.start_worker("small", small=False, ZETA_WORKER_SLOTS="2")
    fleet.drain("wide")
    wait_until(lambda: newest_of(fleet, job_id) > saved + 40, 200, "checkpoints of the other worker")
    fleet.request(job_id, "pause")
    job = fleet.wait_for_status(job_id, "paused", 60)
    attempts = fleet.attempts(job_id)
    assert [attempt.reason for attempt in attempts[:2]] == ["process_killed", "process_killed"]
    assert (attempts[-1].worker, attempts[-1].reason) == ("small", "paused_by_user")
    firsts = [attempt.first_step for attempt in attempts if attempt.first_step is not None]
    assert firsts == sorted(set(firsts)), "each attempt continued after the one before it"
    assert (job.resolved_spec["world_size"], job.resolved_spec["global_batch_size"]) == (4, 4)
    assert not processes_of_job(job_id)
    fleet.check_events(job_id)
