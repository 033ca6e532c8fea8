"""Which worker gets which job, why the others wait, and what happens to unclaimed dispatches."""

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from server.database.model_bases import names_of_bases
from server.database.tables import CheckpointRow
from server.engine.dispatcher import Dispatcher
from server.engine.load import read_load_for_dispatch
from server.engine.redis_client import connect
from server.engine.worker_secrets import WorkerSecrets
from tests.harness.fleet import SECRET, SmallFleet, small_fleet
from tests.harness.simulated_worker import SimulatedWorker
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.stepped_scheduler import SteppedScheduler, change, drain, waiting_code
from zeta_core.contract.access import ProjectLimits
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.wire.messages import Dispatch
from zeta_core.system.redis_access import RedisUnavailable


@pytest.fixture
def fleet(database_url: str | None, tmp_path: Path) -> Iterator[SmallFleet]:
    """A database without a running engine; the tests run the passes of the scheduler."""
    with small_fleet(tmp_path, "redis://127.0.0.1:1/0", database_url) as fleet:
        yield fleet


def test_jobs_start_by_priority_then_age_on_the_worker_with_the_most_free_slots(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    old, young, urgent = (fleet.submit() for _ in range(3))
    change(fleet, urgent, priority=5)
    stepped.update_workers(small=1, large=2)
    assert [job_id for job_id, _ in stepped.step()] == [urgent, old, young]
    assert [message.worker for message in stepped.sent].count("large") == 2
    job = fleet.job(urgent)
    assert (job.status, job.worker, job.slots) == ("queued", "large", [0])
    assert waiting_code(fleet, urgent) == "handing_over"
    assert stepped.step() == []


def test_every_waiting_job_has_a_reason_and_its_start(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    job_id = fleet.submit()
    stepped.step()
    assert waiting_code(fleet, job_id) == "no_worker"
    since = (fleet.job(job_id).waiting_reason or {})["since"]
    stepped.step()
    assert (fleet.job(job_id).waiting_reason or {})["since"] == since
    stepped.update_workers(busy={"slots": 1, "running": [("job_other", 1)]})
    stepped.step()
    assert waiting_code(fleet, job_id) == "workers_busy"
    change(fleet, job_id, not_before=utc_now() + timedelta(minutes=4))
    stepped.step()
    assert waiting_code(fleet, job_id) == "retry_backoff"
    change(fleet, job_id, not_before=None, spec={"resources": {"gpus": 1}})
    stepped.step()
    assert waiting_code(fleet, job_id) == "never_fits"
    stepped.update_workers(busy={"slots": 1, "stopping": True})
    stepped.step()
    assert waiting_code(fleet, job_id) == "no_worker"
    stepped.workers.record_outage()
    stepped.step()
    assert "Redis is unreachable" in (fleet.job(job_id).waiting_reason or {})["message"]


def test_a_pass_that_cannot_place_a_job_does_not_read_the_queue(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    busy = {"slots": 1, "running": [("job_other", 1)]}
    stepped.update_workers(box=busy)
    stepped.step()
    job_id = fleet.submit()
    assert stepped.step(queue_changed=False) == []
    assert waiting_code(fleet, job_id) is None
    stepped.update_workers(box=busy, another=busy)  # the reasons may have changed
    stepped.step(queue_changed=False)
    assert waiting_code(fleet, job_id) == "workers_busy"
    stepped.update_workers(box=1, another=busy)
    assert stepped.step(queue_changed=False) == [(job_id, "box")]


def test_a_new_job_gets_its_waiting_reason_without_a_pass(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    job = fleet.job(fleet.submit())

    def code(**spec: Any) -> str | None:
        job.spec = {"resources": spec}
        return (stepped.scheduler.explain(job) or {}).get("code")

    assert code() == "no_worker"
    stepped.update_workers(box=1)
    assert code() is None  # no pass has considered this worker yet
    change(fleet, job.id, spec={"resources": {"gpus": 1}})
    stepped.step()
    assert (code(), code(gpus=1)) == (None, "never_fits")
    stepped.update_workers(box={"slots": 1, "running": [("job_other", 1)]})
    stepped.step()
    assert (code(), code(gpus=1)) == ("workers_busy", "never_fits")
    stepped.workers.record_outage()
    assert code() == "no_worker"


def test_the_queue_is_read_by_priority_and_age_over_several_pages(
    fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.scheduling.queue_pages.PAGE_JOBS", 2)
    stepped = SteppedScheduler(fleet)
    jobs = [fleet.submit() for _ in range(7)]
    for job_id, priority in zip(jobs, (0, 5, -5, 0, 5, 0, 5), strict=True):
        change(fleet, job_id, priority=priority)
    stepped.update_workers(large=7)
    assert [job_id for job_id, _ in stepped.step()] == [jobs[number] for number in (1, 4, 6, 0, 3, 5, 2)]


def test_drained_outdated_and_full_workers_are_reported_as_reasons(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    plain, timed = fleet.submit(), fleet.submit()
    change(fleet, timed, spec={"time_limit_seconds": 60})
    stepped.update_workers(full={"disk_low": True}, old={"contract_version": 1, "slots": 2})
    assert stepped.step() == [(plain, "old")]
    assert waiting_code(fleet, timed) == "disk"
    other = SteppedScheduler(fleet)
    other.update_workers(old={"contract_version": 1, "slots": 2})
    other.step()
    assert waiting_code(fleet, timed) == "worker_too_old"
    other.update_workers(new={})
    drain(fleet, "new")
    other.step()
    assert waiting_code(fleet, timed) == "no_worker"
    assert "drained" in (fleet.job(timed).waiting_reason or {})["message"]


def test_a_project_runs_at_most_its_quota_of_jobs(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet, default_limits=ProjectLimits(max_running_jobs=1))
    first, second, of_another = (fleet.submit() for _ in range(3))
    change(fleet, of_another, project="another")
    stepped.update_workers(large=4)
    assert stepped.step() == [(first, "large"), (of_another, "large")]
    assert waiting_code(fleet, second) == "quota"
    reason = fleet.job(second).waiting_reason or {}
    assert (reason["details"], "ZETA_PROJECT_MAX_RUNNING" in reason["message"]) == ({"limit": 1}, True)
    change(fleet, first, status="running")
    other_server = SteppedScheduler(fleet, default_limits=ProjectLimits(max_running_jobs=1))
    other_server.update_workers(large=4)
    assert other_server.step() == []
    change(fleet, first, status="succeeded", worker=None)
    assert stepped.step() == [(second, "large")]


def test_an_unclaimed_dispatch_is_withdrawn_and_repeated(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet, claim_seconds=0.05)
    job_id = fleet.submit()
    stepped.update_workers(first=1)
    assert stepped.step() == [(job_id, "first")]
    first = fleet.job(job_id).dispatched_at
    sent = wait_until(lambda: stepped.step() or stepped.step(), 10, "the second dispatch")
    assert sent == [(job_id, "first")]
    assert fleet.job(job_id).dispatched_at != first
    assert [message.attempt for message in stepped.sent] == [1, 1]


def test_a_dispatch_to_a_silent_worker_is_moved_to_another(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet, claim_seconds=1000)
    job_id = fleet.submit()
    stepped.update_workers(first=1)
    assert stepped.step() == [(job_id, "first")]
    for _ in range(20):  # seconds during which the server is connected
        stepped.now += 1
        stepped.workers.update({})
    stepped.update_workers(second=1)
    assert stepped.step() == [(job_id, "second")]


def test_a_failed_dispatch_leaves_the_job_queued_without_a_worker(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet, fails=True)
    job_id = fleet.submit()
    stepped.update_workers(first=1)
    stepped.step()
    assert (fleet.job(job_id).worker, fleet.job(job_id).dispatched_at) == (None, None)
    stepped.fails = False
    assert stepped.step() == [(job_id, "first")]


def test_the_next_attempt_resumes_from_the_newest_stored_checkpoint(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    job_id, other = fleet.submit(), fleet.submit()

    async def store(*checkpoints: tuple[str, str, int]) -> None:
        async with fleet.database.write() as session:
            session.add_all(
                CheckpointRow(job_id=job, name=name, step=step, attempt=1, bytes=1, metrics={}, created_at=utc_now())
                for job, name, step in checkpoints
            )

    fleet.loop.run(store((job_id, "step-9", 9), (job_id, "step-10", 10), (job_id, "best", 4), (job_id, "final", 10)))
    change(fleet, other, spec={"resume_from_checkpoint": job_id})
    stepped.update_workers(box=2)
    stepped.step()
    assert [message.resume_from for message in stepped.sent] == [f"{job_id}/step-10", f"{job_id}/step-10"]


def test_every_attempt_starts_from_the_checkpoint_resolved_at_submission(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    job_id = fleet.submit()
    change(
        fleet,
        job_id,
        spec={"model": {"job": "job_1", "checkpoint": "latest"}, "seed": 3},
        resolved_spec_json={"model": {"job": "job_1", "checkpoint": "step-5"}, "seed": 3, "priority": 0},
    )
    stepped.update_workers(box=1)
    stepped.step()
    assert stepped.sent[0].spec["model"] == {"job": "job_1", "checkpoint": "step-5"}


def test_a_dispatch_names_the_bases_of_an_adapter_within_its_project(fleet: SmallFleet) -> None:
    """The worker opens only these: the adapter's own files, which a run has written, could name any model."""
    stepped = SteppedScheduler(fleet)
    adapter, on_adapter, full, foreign, on_foreign = (fleet.submit() for _ in range(5))
    for job_id, model, lora in (
        (adapter, "org/model@main", {"r": 2}),
        (on_adapter, {"job": adapter, "checkpoint": "step-5"}, {"r": 2}),
        (full, {"job": on_adapter, "checkpoint": "final"}, None),
        (foreign, {"file": "file_1"}, {"r": 2}),
        (on_foreign, {"job": foreign, "checkpoint": "final"}, {"r": 2}),
    ):
        latest = {**model, "checkpoint": "latest"} if isinstance(model, dict) and "job" in model else model
        change(fleet, job_id, spec={"model": latest, "lora": lora}, resolved_spec_json={"model": model})
    change(fleet, foreign, project="another")

    async def bases(job_id: str) -> list[str]:
        async with fleet.database.read() as session:
            return await names_of_bases(session, "default", {"job": job_id})

    assert fleet.loop.run(bases(on_adapter)) == [f"{adapter}/step-5", "org/model"]
    assert fleet.loop.run(bases(full)) == [], "the weights of a full fine-tuning have no base"
    assert fleet.loop.run(bases(foreign)) == fleet.loop.run(bases(on_foreign)) == []
    stepped.update_workers(box=5)
    stepped.step()
    sent = {message.job_id: message.bases for message in stepped.sent}
    assert sent[full] == [f"{adapter}/step-5", "org/model"]
    assert sent[on_adapter] == ["org/model"]
    assert sent[adapter] == sent[on_foreign] == []


def test_workers_silent_since_before_the_server_started_get_no_job(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    stepped.workers.record_outage()
    stepped.update_workers(dead=1)  # in Redis at the first read
    fleet.submit()
    assert stepped.step() == []
    stepped.update_workers(dead=1)  # a new heartbeat
    assert len(stepped.step()) == 1


def test_two_schedulers_never_assign_a_slot_twice(tmp_path: Path, postgres_url: str) -> None:
    with small_fleet(tmp_path, "redis://127.0.0.1:1/0", postgres_url) as fleet:
        both = [SteppedScheduler(fleet), SteppedScheduler(fleet)]
        jobs = {fleet.submit() for _ in range(6)}
        for stepped in both:
            stepped.update_workers(box=4)

        async def pass_together() -> None:
            await asyncio.gather(*(stepped.scheduler.one_pass() for stepped in both))

        fleet.loop.run(pass_together())
        sent = [message for stepped in both for message in stepped.sent]
        assert sorted(slot for message in sent for slot in message.slots) == [0, 1, 2, 3]
        assert len({message.job_id for message in sent}) == 4
        assert {message.job_id for message in sent} < jobs


@pytest.mark.extended
def test_a_late_claim_of_a_withdrawn_dispatch_is_denied(
    tmp_path: Path, redis_url: str, shared_valkey: ValkeyServer
) -> None:
    with small_fleet(tmp_path, redis_url, claim_seconds=1) as fleet, shared_valkey.client() as client:
        fleet.start_engine()
        slow_worker = SimulatedWorker(client, SECRET, "slow")
        job_id = fleet.submit()

        def was_dispatched_to(worker: SimulatedWorker) -> bool:
            worker.send_heartbeat()
            return fleet.job(job_id).worker == worker.name

        wait_until(lambda: was_dispatched_to(slow_worker), 15, "the first dispatch")
        wait_until(lambda: slow_worker.num_dispatched() == 1, 5, "its message")
        slow_worker.stopping = True
        slow_worker.send_heartbeat()
        fast_worker = SimulatedWorker(client, SECRET, "fast")
        wait_until(lambda: was_dispatched_to(fast_worker), 15, "the second dispatch")
        denied = slow_worker.claim(job_id)
        assert (denied.granted, denied.reason) == (False, "the dispatch was withdrawn")
        assert fast_worker.claim(job_id).granted
        assert slow_worker.claim(job_id).reason == "the attempt was started by another process"


def test_the_dispatcher_recovers_after_a_redis_outage(own_valkey: ValkeyServer) -> None:
    dispatcher = Dispatcher(own_valkey.url, connect(own_valkey.url), WorkerSecrets(SECRET))
    message = Dispatch(job_id="job_1", attempt=1, worker="w", slots=[0], spec={})
    asyncio.run(dispatcher.send(message))
    own_valkey.kill()
    for _ in range(2):
        with pytest.raises(RedisUnavailable):
            asyncio.run(dispatcher.send(message))
    own_valkey.start()
    asyncio.run(dispatcher.send(message))
    with own_valkey.client() as client:
        assert SimulatedWorker(client, SECRET, "w").num_dispatched() == 2


def test_a_dispatch_reads_other_workers_only_for_a_project_with_limits(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    for _ in range(3):
        fleet.submit()
    stepped.update_workers(one=1, two=1, three=1)
    project = fleet.job(stepped.step()[0][0]).project

    async def read(limits: ProjectLimits) -> tuple[dict[str, set[int]], int]:
        async with fleet.database.read() as session:
            load = await read_load_for_dispatch(session, limits, [project], ["one"])
        return load.slots, load.jobs[project]

    assert fleet.loop.run(read(ProjectLimits())) == ({"one": {0}}, 1)
    everywhere = {"one": {0}, "two": {0}, "three": {0}}
    assert fleet.loop.run(read(ProjectLimits(max_running_jobs=5))) == (everywhere, 3)
    assert fleet.loop.run(read(ProjectLimits(max_gpus=5))) == (everywhere, 3)


def test_a_job_that_cannot_be_dispatched_does_not_affect_its_group(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    jobs = [fleet.submit() for _ in range(4)]
    change(fleet, jobs[1], kind="of another version")
    stepped.update_workers(box=8)
    with pytest.raises(ValueError, match="of another version"):
        stepped.step()
    assert {message.job_id for message in stepped.sent} == {jobs[0], jobs[2], jobs[3]}
    assert fleet.job(jobs[1]).worker is None
    assert len({slot for message in stepped.sent for slot in message.slots}) == 3
