"""The worker with the real training core: ``python -m zeta_core RUN_DIR`` as it is launched in production."""

import pytest

from tests.end_to_end.specs import tiny_job
from tests.harness.fleet import Bench


@pytest.mark.timeout(150)
def test_a_real_training_is_launched_published_and_stored(fleet: Bench) -> None:
    fleet.start_worker(small=False)
    job_id = fleet.submit(spec=tiny_job(max_steps=4, checkpointing_steps=2))
    job = fleet.wait_for_status(job_id, "succeeded", 120)
    assert job.result is not None
    assert job.result["tokens"] > 0
    assert {"final", "step-4"} <= set(fleet.checkpoints(job_id))
    fleet.check_events(job_id)
