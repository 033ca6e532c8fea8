"""``python -m tests.chaos.figures``: how long recovery takes with the limits at their defaults, measured once each.

The trainings are real (``python -m zeta_core``), on a fleet of one server, one Valkey, SQLite and two hosts. It prints
a table and asserts nothing but that each recovery came; a figure is only as quiet as the machine.
"""

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.databases import SqliteUnderFire, Standing
from tests.chaos.fleet import Fleet, Host, running_fleet
from tests.chaos.orders import Order, spec_of
from tests.chaos.users import Users
from tests.harness.children import end_in_order_on_sigterm
from tests.harness.waiting import wait_until
from zeta_core.system.settings import LEASE_SECONDS

ROOM = {"ZETA_DISK_MIN_FREE_BYTES": "0"}  # the hosts' disks are small
CHECKPOINT_EVERY = 50
LONG_SECONDS = 180.0


@dataclass(frozen=True)
class Figure:
    what: str
    limit: str
    measured: str


class Laboratory:
    """One endless real training at a time."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._users = Users(fleet.servers)
        self._job_id = ""

    def begin(self) -> None:
        """Cancel the training before, and start one that has made a checkpoint when this returns."""
        if self._job_id:
            wait_until(lambda: self._users.ask("POST", f"/v1/jobs/{self._job_id}/cancel"), 30, "the cancel")
            wait_until(lambda: not self.fleet.trainings(), 60, "the last training to end")
        spec = spec_of("real", "") | {"max_steps": 10**6, "checkpointing_steps": CHECKPOINT_EVERY}
        posted = wait_until(lambda: self._users.post(Order(f"figure-{time.monotonic()}", "real", spec)), 30, "a 201")
        assert posted is not None
        self._job_id = posted
        self._wait_for(lambda now: (now.last_step or 0) > CHECKPOINT_EVERY + CHECKPOINT_EVERY // 2, "a checkpoint")

    @property
    def standing(self) -> Standing:
        return self.fleet.database.standings()[self._job_id]

    @property
    def host(self) -> Host:
        return next(host for host in self.fleet.hosts if host.name == self.standing.worker)

    def seconds_until_a_new_step(self, since: Standing, *, attempt: int) -> float:
        """Until the server has stored a step of this attempt that it had not at ``since``."""
        began = time.monotonic()
        self._wait_for(lambda now: now.attempt == attempt and now.last_step is not None and now != since, "a new step")
        return time.monotonic() - began

    def seconds_until_attempt(self, attempt: int) -> float:
        began = time.monotonic()
        self._wait_for(lambda now: now.attempt == attempt, f"attempt {attempt}")
        return time.monotonic() - began

    def steps_lost(self) -> int:
        """How many steps the second attempt makes again."""
        first, second, *_ = self.fleet.database.attempts(self._job_id)
        return (first.last_step or 0) + 1 - (second.first_step or 0)

    def _wait_for(self, reached: Callable[[Standing], bool], what: str) -> None:
        try:
            wait_until(lambda: reached(self.standing), LONG_SECONDS, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.fleet.logs()}") from None


def training_killed(laboratory: Laboratory) -> list[Figure]:
    laboratory.begin()
    before = laboratory.standing
    (training,) = laboratory.fleet.trainings()
    training.process.kill()
    seconds = laboratory.seconds_until_a_new_step(before, attempt=2)
    return [
        Figure("training killed → first new step", "≤ 15 s", f"{seconds:.1f} s"),
        Figure("steps lost by a kill", f"≤ {CHECKPOINT_EVERY}, the checkpoint interval", str(laboratory.steps_lost())),
    ]


def worker_killed(laboratory: Laboratory) -> list[Figure]:
    laboratory.begin()
    host = laboratory.host
    host.end(signal.SIGKILL)
    before = laboratory.standing
    host.start()
    seconds = laboratory.seconds_until_a_new_step(before, attempt=1)
    return [Figure("worker killed → events of the same attempt, from its restart", "≤ 5 s", f"{seconds:.1f} s")]


def worker_told_to_stop(laboratory: Laboratory) -> list[Figure]:
    laboratory.begin()
    host, before = laboratory.host, laboratory.standing
    host.end(signal.SIGTERM)
    seconds = laboratory.seconds_until_a_new_step(before, attempt=2)
    host.start()
    return [
        Figure("steps lost when a worker is told to stop (SIGTERM)", "0", str(laboratory.steps_lost())),
        Figure("worker told to stop → first new step on another", "–", f"{seconds:.1f} s"),
    ]


def redis_killed(laboratory: Laboratory) -> list[Figure]:
    laboratory.begin()
    laboratory.fleet.valkey.kill()
    before = laboratory.standing
    laboratory.fleet.valkey.start()
    seconds = laboratory.seconds_until_a_new_step(before, attempt=1)
    return [Figure("Redis back → events", "≤ 5 s", f"{seconds:.1f} s")]


def host_gone(laboratory: Laboratory) -> list[Figure]:
    laboratory.begin()
    host = laboratory.host
    host.vanish()
    before = laboratory.standing
    laboratory.fleet.retire(host)
    started = laboratory.seconds_until_attempt(2)
    seconds = started + laboratory.seconds_until_a_new_step(before, attempt=2)
    limit = f"≤ {LEASE_SECONDS + 20:.0f} s (lease + 20 s)"
    return [
        Figure("host gone → new attempt", limit, f"{started:.1f} s"),
        Figure("host gone → first new step", "–", f"{seconds:.1f} s"),
    ]


MEASUREMENTS: tuple[Callable[[Laboratory], list[Figure]], ...] = (
    training_killed,
    worker_killed,
    worker_told_to_stop,
    redis_killed,
    host_gone,
)


def main() -> int:
    end_in_order_on_sigterm()
    folder = Path(tempfile.mkdtemp(prefix="figures-"))
    figures: list[Figure] = []
    try:
        database = SqliteUnderFire(folder / "zeta.db")
        with running_fleet(folder, database, limits=ROOM) as fleet:
            laboratory = Laboratory(fleet)
            for measure in MEASUREMENTS:
                figures += measure(laboratory)
        database.close()
    finally:
        shutil.rmtree(folder)
    print("| what | limit | measured |\n|---|---|---|")
    for figure in figures:
        print(f"| {figure.what} | {figure.limit} | {figure.measured} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
