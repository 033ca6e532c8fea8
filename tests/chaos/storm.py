"""The storm: faults struck at a fleet one after the other while its users go on, until every job has ended.

Only the seed decides what is ordered, what is struck and for how long; when exactly it meets a job depends on the
machine, so a seed repeats the same weather, not the same instant.
"""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from tests.chaos.databases import AWAY, Standing
from tests.chaos.faults import Fault, Hit
from tests.chaos.fleet import Fleet
from tests.chaos.users import Users
from zeta_core.contract.job.status import ENDED, JobStatus

LOOK_SECONDS = 0.25
PAUSE_SECONDS = (1.0, 6.0)  # between two faults
LAST_JOBS = 4  # the storm ends when so few are left that it would only hit the same ones again and again


@dataclass
class Struck:
    """One fault that was struck, and what became of the jobs that it hit."""

    fault: Fault
    hit: Hit
    before: dict[str, Standing]
    mended_at: float | None = None
    mended: dict[str, Standing] | None = None
    recovered: dict[str, float] = field(default_factory=dict[str, float])  # seconds after it was mended
    attempts_lost: set[str] = field(default_factory=set[str])

    def look(self, standings: dict[str, Standing], now: float) -> None:
        """Take notice of the jobs that have recovered: a new step is stored, or the job waits or ended truly."""
        if self.mended_at is None:
            return
        if self.mended is None:
            self.mended = standings
        for job_id in self.hit.jobs - self.recovered.keys():
            present = standings[job_id]
            at_hit, at_mended = self.before[job_id], self.mended[job_id]
            goes_on = present.status == JobStatus.RUNNING and present.last_step is not None
            moved = (present.attempt, present.last_step) != (at_mended.attempt, at_mended.last_step)
            next_one = present.attempt > at_hit.attempt
            at_rest = present.status in ENDED or present.status == JobStatus.PAUSED
            if at_rest or (goes_on and (next_one or (moved and not self.hit.ends_attempts))):
                self.recovered[job_id] = now - self.mended_at
                if next_one:
                    self.attempts_lost.add(job_id)


class Storm:
    def __init__(
        self, fleet: Fleet, users: Users, faults: Sequence[Fault], dice: Random, say: Callable[[str], None]
    ) -> None:
        self.struck: list[Struck] = []
        self._fleet = fleet
        self._users = users
        self._dice = dice
        self._say = say
        self._faults = tuple(faults)
        self._tick = threading.Event()  # never set
        self._began = time.monotonic()

    def rage(self, *, limit_seconds: float, rounds: int | None = None) -> None:
        """Strike until few jobs are left or every fault had ``rounds`` turns, for ``limit_seconds`` at most."""
        deadline = time.monotonic() + limit_seconds
        for fault in self._weather(rounds):
            is_quiet = self._users.num_waiting <= (LAST_JOBS if rounds is None else 0)
            if is_quiet or time.monotonic() > deadline:
                return
            self._strike(fault)
            self._watch(self._dice.uniform(*PAUSE_SECONDS))

    def settle(self, limit_seconds: float) -> None:
        """Everything is mended: wait until the users have seen every job end, or for so long."""
        deadline = time.monotonic() + limit_seconds
        while not self._users.all_ended.is_set() and time.monotonic() < deadline:
            self._watch(LOOK_SECONDS)
        self._watch(4 * LOOK_SECONDS)

    def _weather(self, rounds: int | None) -> "itertools.chain[Fault]":
        """The faults in an order of the dice: each round has every fault as often as its weight says."""

        def one_round(_number: int) -> list[Fault]:
            bag = [fault for fault in self._faults for _ in range(fault.weight if rounds is None else 1)]
            self._dice.shuffle(bag)
            return bag

        numbers = itertools.count() if rounds is None else range(rounds)
        return itertools.chain.from_iterable(one_round(number) for number in numbers)

    def _strike(self, fault: Fault) -> None:
        dice = Random(self._dice.random())  # of its own: how many numbers it draws does not shift the later weather
        before = self._fleet.database.standings()
        blow = fault.strike(self._fleet, dice)
        hit = next(blow, None)
        if hit is None:
            return
        now = time.monotonic()
        struck = Struck(fault, hit, before)
        self.struck.append(struck)
        lasts = f" for {hit.lasts_seconds:.1f} s" if hit.lasts_seconds else ""
        self._say(f"{now - self._began:6.1f} s  {fault.name}{lasts}; {len(hit.jobs)} job(s) ran there")
        self._watch(hit.lasts_seconds)
        for _ in blow:
            raise AssertionError(f"{fault.name} struck twice")
        struck.mended_at = time.monotonic() if hit.lasts_seconds else now

    def _watch(self, seconds: float) -> None:
        """Let so much time pass, and see who has recovered meanwhile."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._tick.wait(min(LOOK_SECONDS, left))
            open_ones = [struck for struck in self.struck if struck.hit.jobs - struck.recovered.keys()]
            if not open_ones:
                continue
            try:
                standings = self._fleet.database.standings()
            except AWAY:
                continue  # that is the fault under way
            for struck in open_ones:
                struck.look(standings, time.monotonic())
