"""Lesson 1: submit a job, follow it, and control it.

``client`` is a `zeta.Client` of a running service, and ``finished_job`` is a job that has succeeded (conftest.py).
"""

import pytest

from tests.harness.waiting import wait_until
from tests.tutorial.conftest import SPEC
from zeta import Client
from zeta_core.contract.job.job import Job


@pytest.mark.extended
def test_submit_a_job_and_follow_its_events(client: Client) -> None:
    job = client.submit(SPEC)
    assert job.status == "queued"  # the job is stored on disk and survives any crash

    events = list(client.events(job.id))  # a live stream, which ends when the job ends
    assert [event.seq for event in events] == list(range(1, len(events) + 1))  # in order, without gaps or duplicates
    assert {"status", "log", "progress", "checkpoint"} <= {event.type for event in events}

    job = client.job(job.id)
    assert (job.status, job.status_reason) == ("succeeded", "completed")
    assert job.result is not None
    assert job.result.train_loss is not None


def test_read_the_defaults_that_a_job_used(finished_job: Job) -> None:
    assert "optimizer" not in finished_job.spec  # the spec as submitted
    assert finished_job.resolved_spec["optimizer"] == "adamw"  # the spec with all defaults, as trained
    assert finished_job.resolved_spec["seed"] == 42


def test_read_events_and_logs_of_a_finished_job(client: Client, finished_job: Job) -> None:
    progress = [event.model_dump() for event in client.stored_events(finished_job.id) if event.type == "progress"]
    assert [event["step"] for event in progress if event["loss"] is not None][-1] == 4
    assert "attempt 1" in "".join(client.logs(finished_job.id))


def newest_step(job: Job) -> int:
    """The last trained step that the server knows; 0 before the first."""
    step = (job.progress or {}).get("step")
    return step if isinstance(step, int) else 0


def test_pause_resume_and_cancel_a_job(client: Client) -> None:
    job = client.submit({**SPEC, "max_steps": 1_000_000})
    wait_until(lambda: newest_step(client.job(job.id)) > 0, 90, "the first step")

    client.pause(job.id)  # saves a checkpoint and frees the device
    wait_until(lambda: client.job(job.id).status == "paused", 60, "the job to be paused")
    saved_step = newest_step(client.job(job.id))

    client.resume(job.id)  # continues from the checkpoint
    wait_until(lambda: newest_step(client.job(job.id)) > saved_step, 90, "a further step")

    client.cancel(job.id)  # ends the training processes; checkpoints and logs are kept
    cancelled = client.wait(job.id)
    assert (cancelled.status, cancelled.status_reason) == ("cancelled", "cancelled_by_user")
    first, second = cancelled.attempts
    assert second.first_step == (first.last_step or 0) + 1


def test_continue_a_finished_job_for_more_steps(client: Client, finished_job: Job) -> None:
    longer = client.rerun(finished_job.id, {"max_steps": 6}, from_checkpoint="latest")
    longer = client.wait(longer.id)
    assert (longer.status, longer.parent) == ("succeeded", finished_job.id)
    assert longer.attempts[0].first_step == 5  # the first job trained 4 steps
