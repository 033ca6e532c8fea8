"""Which worker gets which job, why the others wait, and what happens to unclaimed dispatches."""

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from server.database.tables import CheckpointRow, DrainRow, JobRow
from server.engine.dispatcher import Dispatcher
from server.engine.known_workers import KnownWorkers
from server.engine.redis_client import connect
from server.engine.scheduler import Scheduler
from tests.harness.fleet import SECRET, SmallFleet, small_fleet
from tests.harness.simulated_worker import SimulatedWorker, signed_heartbeat
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from zeta_core.contract.access import ProjectLimits
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.wire.messages import Dispatch
from zeta_core.system.redis_access import RedisUnavailable


@pytest.fixture(params=["sqlite", "postgresql"])
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallFleet]:
    """A database without a running engine; the tests run the passes of the scheduler."""
    url = str(request.getfixturevalue("postgres_url")) if request.param == "postgresql" else None
    with small_fleet(tmp_path, "redis://127.0.0.1:1/0", url) as fleet:
        yield fleet


class SteppedScheduler:
    """A scheduler whose passes the test runs, its known workers, and the dispatches that it has sent."""

    def __init__(
        self, fleet: SmallFleet, *, claim_seconds: float = 10, fails: bool = False, **limits: ProjectLimits
    ) -> None:
        self.sent: list[Dispatch] = []
        self.now = 0.0
        self.beats = 0
        self.fails = fails
        self.workers = KnownWorkers(SECRET, lambda: self.now)
        self._fleet = fleet
        self.scheduler = Scheduler(fleet.database, self.workers, self._send, claim_seconds=claim_seconds, **limits)
        self.workers.update({})

    async def _send(self, message: Dispatch) -> None:
        if self.fails:
            raise RedisUnavailable("no connection")
        self.sent.append(message)

    def update_workers(self, **workers: Any) -> None:
        """Heartbeats of these workers: a number of CPU slots, or the fields of `signed_heartbeat`."""
        self.beats += 1
        entries = {
            name: signed_heartbeat(SECRET, name, self.beats, **(kind if isinstance(kind, dict) else {"slots": kind}))
            for name, kind in workers.items()
        }
        self.workers.update(entries)

    def step(self, *, queue_changed: bool = True) -> list[tuple[str, str]]:
        """One pass; the (job, worker) that it sent."""
        before = len(self.sent)
        if queue_changed:
            self.scheduler.queue_changed()
        self._fleet.loop.run(self.scheduler.one_pass())
        return [(message.job_id, message.worker) for message in self.sent[before:]]


def change(fleet: SmallFleet, job_id: str, **values: Any) -> None:
    async def write() -> None:
        async with fleet.database.write() as session:
            job = await session.get_one(JobRow, job_id)
            for name, value in values.items():
                setattr(job, name, value)

    fleet.loop.run(write())


def waiting_code(fleet: SmallFleet, job_id: str) -> str | None:
    reason = fleet.job(job_id).waiting_reason
    return reason["code"] if reason else None


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
    stepped.workers.unreachable()
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
    stepped.workers.unreachable()
    assert code() == "no_worker"


def test_the_queue_is_read_by_priority_and_age_over_several_pages(
    fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.scheduler.PAGE_JOBS", 2)
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


def drain(fleet: SmallFleet, worker: str) -> None:
    async def write() -> None:
        async with fleet.database.write() as session:
            session.add(DrainRow(worker=worker, created_by="key_test", created_at=utc_now()))

    fleet.loop.run(write())


def test_a_job_uses_one_slot_per_gpu_and_waits_for_them(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    change(fleet, fleet.submit(), spec={"resources": {"gpus": 1}}, priority=1)
    pair = fleet.submit()
    change(fleet, pair, spec={"resources": {"gpus": 2}})
    stepped.update_workers(box={"slots": 2, "kind": "cuda"})
    stepped.step()
    assert [message.slots for message in stepped.sent] == [[0]]
    assert waiting_code(fleet, pair) == "resources"


def test_a_started_job_keeps_its_choice_of_gpu_or_cpu(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    on_gpu, on_cpu = fleet.submit(), fleet.submit()
    not_there: dict[str, Any] = {"worker": None, "slots": None, "dispatched_at": None}
    stepped.update_workers(box={"kind": "cuda"})
    assert stepped.step() == [(on_gpu, "box")]
    change(fleet, on_gpu, attempt=1, **not_there)
    stepped.update_workers(box={"stopping": True}, plain=2)
    assert stepped.step() == [(on_cpu, "plain")]
    assert waiting_code(fleet, on_gpu) == "never_fits"
    change(fleet, on_cpu, attempt=1, **not_there)
    stepped.update_workers(box={"slots": 2, "kind": "cuda"}, plain={"stopping": True})
    assert sorted(stepped.step()) == sorted([(on_gpu, "box"), (on_cpu, "box")])
    decided = [(message.job_id, message.spec["resources"]) for message in stepped.sent]
    one, none = ({"gpus": gpus, "nodes": 1, "processes": None} for gpus in (1, 0))
    assert dict(decided) == {on_gpu: one, on_cpu: none}  # the latter on the box's CPU
    assert none.items() <= fleet.job(on_cpu).resolved_spec["resources"].items()


def test_a_started_job_waits_for_enough_cores(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    job_id = fleet.submit()
    change(fleet, job_id, attempt=1, resolved_spec_json={"threads": 4, "resources": {"gpus": 0}})
    stepped.update_workers(small={"cores": 2})
    assert stepped.step() == []
    reason = fleet.job(job_id).waiting_reason
    assert reason is not None
    assert (reason["code"], reason["details"]) == ("never_fits", {"threads": 4})
    assert "started with 4 threads" in reason["message"]
    of_another_job = fleet.submit(spec={"model": "m", "resume_from_checkpoint": f"{job_id}/step-4"})
    change(fleet, of_another_job, attempt=1, resolved_spec_json={"threads": 4, "resources": {"gpus": 0}})
    undecided = fleet.submit()
    change(fleet, undecided, attempt=1, resolved_spec_json={"threads": None, "resources": {"gpus": 0}})
    stepped.update_workers(small={"cores": 2, "slots": 2})
    assert stepped.step() == [(of_another_job, "small"), (undecided, "small")]
    stepped.update_workers(small={"cores": 2}, large={"cores": 4})
    assert stepped.step() == [(job_id, "large")]


def test_the_next_attempt_prefers_the_previous_device_kind(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    first, second = fleet.submit(), fleet.submit()
    for job_id in (first, second):
        change(fleet, job_id, attempt=1, resolved_spec_json={"device_kind": "cpu:old", "resources": {"gpus": 0}})
    stepped.update_workers(new={"slots": 4, "device_kind": "cpu:new"}, old={"device_kind": "cpu:old"})
    assert stepped.step() == [(first, "old"), (second, "new")]


def test_an_exact_job_waits_for_its_device_kind(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    spec = {"resources": {"gpus": 0, "exact": True}}
    started = {"attempt": 1, "spec": spec, "resolved_spec_json": {"device_kind": "cpu:old", **spec}}
    job_id, other = fleet.submit(), fleet.submit()
    change(fleet, job_id, **started)
    stepped.update_workers(new={"device_kind": "cpu:new"}, before={"device_kind": None, "slots": 2})
    assert stepped.step() == [(other, "before")]
    reason = fleet.job(job_id).waiting_reason or {}
    assert (reason["code"], reason["details"]) == ("never_fits", {"device_kind": "cpu:old"})
    assert "Waiting for a worker with device kind cpu:old (resources.exact is true)" in reason["message"]

    stepped.update_workers(
        new={"device_kind": "cpu:new"}, old={"device_kind": "cpu:old", "running": [("job_other", 1)]}
    )
    assert stepped.step() == []
    reason = fleet.job(job_id).waiting_reason or {}
    assert (reason["code"], reason["details"]) == ("resources", {"device_kind": "cpu:old"})
    assert "all such workers are busy" in reason["message"]

    stepped.update_workers(new={"device_kind": "cpu:new"}, old={"device_kind": "cpu:old"})
    assert stepped.step() == [(job_id, "old")]
    assert stepped.sent[-1].spec["resources"] == {
        "gpus": 0,
        "nodes": 1,
        "processes": None,
    }  # known to older workers


def test_an_exact_job_starts_only_where_device_kinds_are_known(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    new, resumed = fleet.submit(), fleet.submit()
    change(fleet, new, spec={"resources": {"exact": True}})
    change(
        fleet,
        resumed,
        spec={"resources": {"exact": True}, "resume_from_checkpoint": "job_1/step-4"},
        resolved_spec_json={"device_kind": "cpu:old"},
    )
    stepped.update_workers(before={"device_kind": None, "slots": 4})
    assert stepped.step() == []
    assert (waiting_code(fleet, new), waiting_code(fleet, resumed)) == ("worker_too_old", "worker_too_old")
    stepped.update_workers(box={"kind": "cuda", "device_kind": "cpu:old"})
    assert stepped.step() == [(new, "box")]
    stepped.update_workers(box={"kind": "cuda", "device_kind": "cpu:old", "slots": 2})
    assert stepped.step() == [(resumed, "box")]
    assert stepped.sent[-1].spec["resources"] == {"gpus": 0, "nodes": 1, "processes": None}


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


def test_workers_silent_since_before_the_server_started_get_no_job(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    stepped.workers.unreachable()
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
    dispatcher = Dispatcher(own_valkey.url, connect(own_valkey.url), SECRET)
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
