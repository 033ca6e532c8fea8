"""A scheduler whose passes a test runs, for the tests of scheduling."""

from typing import Any

from server.database.tables import DrainRow, JobRow
from server.engine.known_workers import KnownWorkers
from server.engine.scheduler import HALF_LIFE_SECONDS, Scheduler
from server.engine.worker_secrets import WorkerSecrets
from tests.harness.fleet import SECRET, SmallFleet
from tests.harness.simulated_worker import signed_heartbeat
from zeta_core.contract.access import ProjectLimits
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.wire.messages import Dispatch
from zeta_core.system.redis_access import RedisUnavailable


class SteppedScheduler:
    """A scheduler whose passes the test runs, its known workers, and the dispatches that it has sent."""

    def __init__(
        self,
        fleet: SmallFleet,
        *,
        claim_seconds: float = 10,
        half_life_seconds: float = HALF_LIFE_SECONDS,
        fails: bool = False,
        **limits: ProjectLimits,
    ) -> None:
        self.sent: list[Dispatch] = []
        self.now = 0.0
        self.beats = 0
        self.fails = fails
        self.workers = KnownWorkers(WorkerSecrets(SECRET), lambda: self.now)
        self._fleet = fleet
        self.scheduler = Scheduler(
            fleet.database,
            self.workers,
            self._send,
            claim_seconds=claim_seconds,
            half_life_seconds=half_life_seconds,
            **limits,
        )
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


def drain(fleet: SmallFleet, worker: str) -> None:
    async def write() -> None:
        async with fleet.database.write() as session:
            session.add(DrainRow(worker=worker, created_by="key_test", created_at=utc_now()))

    fleet.loop.run(write())
