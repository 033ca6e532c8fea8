"""``python -m tests.chaos.recovery_times``: measures recovery times with default settings, once each.

The runs are real (``python -m zeta_core``), on a fleet of one server, one Valkey, SQLite and two hosts. It prints
a table, and asserts only that each recovery happens; the times depend on the load of the machine.
"""

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.databases import JobState, SqliteDatabase
from tests.chaos.fleet import Fleet, Host, running_fleet
from tests.chaos.planned_jobs import PlannedJob, spec_of
from tests.chaos.users import Users
from tests.harness.children import exit_cleanly_on_sigterm
from tests.harness.waiting import wait_until
from zeta_core.system.settings import LEASE_SECONDS

NO_DISK_RESERVE = {"ZETA_DISK_MIN_FREE_BYTES": "0"}  # the hosts' disks are small
CHECKPOINT_EVERY = 50
LONG_SECONDS = 180.0


@dataclass(frozen=True)
class Figure:
    name: str
    limit: str
    measured: str


class RecoveryMeasurements:
    """One endless real run at a time."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._users = Users(fleet.servers)
        self._job_id = ""

    def begin(self) -> None:
        """Cancel the previous run, start a new one, and wait for its first checkpoint."""
        if self._job_id:
            wait_until(lambda: self._users.request("POST", f"/v1/jobs/{self._job_id}/cancel"), 30, "the cancel")
            wait_until(lambda: not self.fleet.training_processes(), 60, "the last run to end")
        spec = spec_of("real", "") | {"max_steps": 10**6, "checkpointing_steps": CHECKPOINT_EVERY}
        posted = wait_until(
            lambda: self._users.submit(PlannedJob(f"figure-{time.monotonic()}", "real", spec)), 30, "a 201"
        )
        assert posted is not None
        self._job_id = posted
        self._wait_for(lambda now: (now.last_step or 0) > CHECKPOINT_EVERY + CHECKPOINT_EVERY // 2, "a checkpoint")

    @property
    def job_state(self) -> JobState:
        return self.fleet.database.job_states()[self._job_id]

    @property
    def host(self) -> Host:
        return next(host for host in self.fleet.hosts if host.name == self.job_state.worker)

    def seconds_until_a_new_step(self, since: JobState, *, attempt: int) -> float:
        """The time until a step of this attempt is stored that was not stored in ``since``."""
        began = time.monotonic()
        self._wait_for(lambda now: now.attempt == attempt and now.last_step is not None and now != since, "a new step")
        return time.monotonic() - began

    def seconds_until_attempt(self, attempt: int) -> float:
        began = time.monotonic()
        self._wait_for(lambda now: now.attempt == attempt, f"attempt {attempt}")
        return time.monotonic() - began

    def steps_lost(self) -> int:
        """The number of steps that the second attempt repeats."""
        first, second, *_ = self.fleet.database.attempts(self._job_id)
        return (first.last_step or 0) + 1 - (second.first_step or 0)

    def _wait_for(self, reached: Callable[[JobState], bool], what: str) -> None:
        try:
            wait_until(lambda: reached(self.job_state), LONG_SECONDS, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.fleet.logs()}") from None


def training_killed(measurements: RecoveryMeasurements) -> list[Figure]:
    measurements.begin()
    before = measurements.job_state
    (training,) = measurements.fleet.training_processes()
    training.process.kill()
    seconds = measurements.seconds_until_a_new_step(before, attempt=2)
    return [
        Figure("training killed → first new step", "≤ 15 s", f"{seconds:.1f} s"),
        Figure(
            "steps lost by a kill", f"≤ {CHECKPOINT_EVERY}, the checkpoint interval", str(measurements.steps_lost())
        ),
    ]


def worker_killed(measurements: RecoveryMeasurements) -> list[Figure]:
    measurements.begin()
    host = measurements.host
    host.end(signal.SIGKILL)
    before = measurements.job_state
    host.start()
    seconds = measurements.seconds_until_a_new_step(before, attempt=1)
    return [Figure("worker killed → events of the same attempt, after its restart", "≤ 5 s", f"{seconds:.1f} s")]


def worker_stopped(measurements: RecoveryMeasurements) -> list[Figure]:
    measurements.begin()
    host, before = measurements.host, measurements.job_state
    host.end(signal.SIGTERM)
    seconds = measurements.seconds_until_a_new_step(before, attempt=2)
    host.start()
    return [
        Figure("steps lost when a worker is stopped (SIGTERM)", "0", str(measurements.steps_lost())),
        Figure("worker stopped → first new step on another worker", "–", f"{seconds:.1f} s"),
    ]


def redis_killed(measurements: RecoveryMeasurements) -> list[Figure]:
    measurements.begin()
    measurements.fleet.valkey.kill()
    before = measurements.job_state
    measurements.fleet.valkey.start()
    seconds = measurements.seconds_until_a_new_step(before, attempt=1)
    return [Figure("Redis back → events", "≤ 5 s", f"{seconds:.1f} s")]


def host_lost(measurements: RecoveryMeasurements) -> list[Figure]:
    measurements.begin()
    host = measurements.host
    host.vanish()
    before = measurements.job_state
    measurements.fleet.retire(host)
    started = measurements.seconds_until_attempt(2)
    seconds = started + measurements.seconds_until_a_new_step(before, attempt=2)
    limit = f"≤ {LEASE_SECONDS + 20:.0f} s (lease + 20 s)"
    return [
        Figure("host lost → new attempt", limit, f"{started:.1f} s"),
        Figure("host lost → first new step", "–", f"{seconds:.1f} s"),
    ]


MEASUREMENTS: tuple[Callable[[RecoveryMeasurements], list[Figure]], ...] = (
    training_killed,
    worker_killed,
    worker_stopped,
    redis_killed,
    host_lost,
)


def main() -> int:
    exit_cleanly_on_sigterm()
    folder = Path(tempfile.mkdtemp(prefix="figures-"))
    figures: list[Figure] = []
    try:
        database = SqliteDatabase(folder / "zeta.db")
        with running_fleet(folder, database, limits=NO_DISK_RESERVE) as fleet:
            measurements = RecoveryMeasurements(fleet)
            for measure in MEASUREMENTS:
                figures += measure(measurements)
        database.close()
    finally:
        shutil.rmtree(folder)
    print("| what | limit | measured |\n|---|---|---|")
    for figure in figures:
        print(f"| {figure.name} | {figure.limit} | {figure.measured} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
