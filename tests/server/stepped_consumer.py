"""A consumer of the workers' messages whose passes a test runs."""

from server.engine.event_signal import EventSignal
from server.engine.job_traces import JobTraces
from server.engine.message_consumer import MessageConsumer
from server.engine.redis_client import DroppedMessages, connect
from server.engine.worker_secrets import WorkerSecrets
from tests.harness.fleet import SECRET, SmallFleet
from tests.server.stepped_scheduler import change


class SteppedConsumer:
    """A consumer without a loop, and what it has dropped. ``num_wakes`` counts the calls after the end of attempts."""

    def __init__(self, fleet: SmallFleet) -> None:
        self.fleet = fleet
        self.dropped = DroppedMessages()
        self.num_wakes = 0
        fleet.loop.run(self._open())

    async def _open(self) -> None:
        self.redis = connect(self.fleet.settings.redis_url)
        self.consumer = MessageConsumer(
            self.fleet.database,
            self.redis,
            self.fleet.settings,
            WorkerSecrets(SECRET),
            EventSignal(),
            self.dropped,
            self._wake,
            JobTraces(self.fleet.database, tracing=None),
        )

    def _wake(self) -> None:
        self.num_wakes += 1

    def one_pass(self) -> None:
        self.fleet.loop.run(self.consumer.one_pass())

    def close(self) -> None:
        self.fleet.loop.run(self.redis.aclose())


def dispatched_job(fleet: SmallFleet, worker: str) -> str:
    """A queued job that was dispatched to this worker, as the scheduler does."""
    job_id = fleet.submit()
    change(fleet, job_id, worker=worker, slots=[0])
    return job_id
