"""Injects faults into a fleet, one after the other, while its users submit jobs.

The seed determines the jobs, the faults and their durations. The moment at which a fault meets a job depends on the
machine, so a seed does not reproduce the exact timing.
"""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from tests.chaos.databases import UNAVAILABLE, JobState
from tests.chaos.faults import Fault, Impact
from tests.chaos.fleet import Fleet
from tests.chaos.users import Users
from zeta_core.contract.job.status import ENDED, JobStatus

POLL_SECONDS = 0.25
PAUSE_SECONDS = (1.0, 6.0)  # between two faults
LAST_JOBS = 4  # with fewer jobs left, the faults would only affect the same ones repeatedly


@dataclass
class InjectedFault:
    """One injected fault, and the recovery of the jobs that it affected."""

    fault: Fault
    impact: Impact
    before: dict[str, JobState]
    ended_at: float | None = None
    after: dict[str, JobState] | None = None
    recovered: dict[str, float] = field(default_factory=dict[str, float])  # seconds after the end of the fault
    attempts_lost: set[str] = field(default_factory=set[str])

    def record_recoveries(self, job_states: dict[str, JobState], now: float) -> None:
        """Record the jobs that have recovered: a new step is stored, or the job has ended or is paused."""
        if self.ended_at is None:
            return
        if self.after is None:
            self.after = job_states
        for job_id in self.impact.jobs - self.recovered.keys():
            present = job_states[job_id]
            at_start, at_end = self.before[job_id], self.after[job_id]
            is_running = present.status == JobStatus.RUNNING and present.last_step is not None
            has_progressed = (present.attempt, present.last_step) != (at_end.attempt, at_end.last_step)
            is_next = present.attempt > at_start.attempt
            has_stopped = present.status in ENDED or present.status == JobStatus.PAUSED
            if has_stopped or (is_running and (is_next or (has_progressed and not self.impact.ends_attempts))):
                self.recovered[job_id] = now - self.ended_at
                if is_next:
                    self.attempts_lost.add(job_id)


class FaultInjector:
    def __init__(
        self, fleet: Fleet, users: Users, faults: Sequence[Fault], rng: Random, log: Callable[[str], None]
    ) -> None:
        self.injected: list[InjectedFault] = []
        self._fleet = fleet
        self._users = users
        self._rng = rng
        self._log = log
        self._faults = tuple(faults)
        self._tick = threading.Event()  # never set
        self._began = time.monotonic()

    def inject_faults(self, *, limit_seconds: float, rounds: int | None = None) -> None:
        """Inject faults until few jobs are left, each fault occurred ``rounds`` times, or the time limit is reached."""
        deadline = time.monotonic() + limit_seconds
        for fault in self._fault_sequence(rounds):
            is_done = self._users.num_waiting <= (LAST_JOBS if rounds is None else 0)
            if is_done or time.monotonic() > deadline:
                return
            self._inject(fault)
            self._watch(self._rng.uniform(*PAUSE_SECONDS))

    def wait_for_recovery(self, limit_seconds: float) -> None:
        """Wait without faults until the users have seen every job end, or until the time limit."""
        deadline = time.monotonic() + limit_seconds
        while not self._users.all_ended.is_set() and time.monotonic() < deadline:
            self._watch(POLL_SECONDS)
        self._watch(4 * POLL_SECONDS)

    def _fault_sequence(self, rounds: int | None) -> "itertools.chain[Fault]":
        """The faults in random order. Each round has every fault ``weight`` times, or once if ``rounds`` is given."""

        def one_round(_number: int) -> list[Fault]:
            bag = [fault for fault in self._faults for _ in range(fault.weight if rounds is None else 1)]
            self._rng.shuffle(bag)
            return bag

        numbers = itertools.count() if rounds is None else range(rounds)
        return itertools.chain.from_iterable(one_round(number) for number in numbers)

    def _inject(self, fault: Fault) -> None:
        rng = Random(self._rng.random())  # separate, so that its number of draws does not change later faults
        before = self._fleet.database.job_states()
        injection = fault.inject(self._fleet, rng)
        impact = next(injection, None)
        if impact is None:
            return
        now = time.monotonic()
        injected = InjectedFault(fault, impact, before)
        self.injected.append(injected)
        lasts = f" for {impact.lasts_seconds:.1f} s" if impact.lasts_seconds else ""
        self._log(f"{now - self._began:6.1f} s  {fault.name}{lasts}; {len(impact.jobs)} job(s) affected")
        self._watch(impact.lasts_seconds)
        for _ in injection:
            raise AssertionError(f"{fault.name} yielded twice")
        injected.ended_at = time.monotonic() if impact.lasts_seconds else now

    def _watch(self, seconds: float) -> None:
        """Wait, and record the jobs that recover meanwhile."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._tick.wait(min(POLL_SECONDS, left))
            unrecovered = [injected for injected in self.injected if injected.impact.jobs - injected.recovered.keys()]
            if not unrecovered:
                continue
            try:
                job_states = self._fleet.database.job_states()
            except UNAVAILABLE:
                continue  # because of the current fault
            for injected in unrecovered:
                injected.record_recoveries(job_states, time.monotonic())
