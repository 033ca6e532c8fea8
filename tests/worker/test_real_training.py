"""The worker with the real training core: ``python -m zeta_core RUN_DIR`` as it is launched in production."""

import pytest

from tests.end_to_end.specs import tiny_job
from tests.harness.fleet import Bench


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_real_training_is_handed_back_by_a_stopping_worker_and_resumed_to_its_end(fleet: Bench) -> None:
    first = fleet.start_worker(small=False, ZETA_STOP_GRACE_SECONDS="30")
    job_id = fleet.submit(spec=tiny_job(max_steps=200, checkpointing_steps=100))
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
    fleet.check_events(job_id)
