"""Decides which waiting jobs start now, and where, and why the others wait.

This is a pure function of frozen values: `make_plan` changes nothing, and equal inputs give equal plans. Jobs are
considered in the order of `fair_share`. A job that doesn't fit now and needs several slots reserves the worker, or the
workers, where it can start first (`placement.reserve`), so jobs further back don't delay it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from server.engine.candidate import Candidate, LiveWorker, Option, Placement, Wait
from server.engine.load import Load
from server.engine.placement import available_options, best_option, choose_among, idle_options, reserve
from server.engine.requirements import Requirements
from server.engine.scheduling.fair_share import in_fair_order
from zeta_core.contract.job.status import WaitingCode

MAX_RESERVATIONS = 20  # jobs that reserve slots at a time; a long queue of large jobs needs no further ones


@dataclass(frozen=True)
class WaitingJob:
    """A job in the queue.

    ``blocked`` is the reason why it can't start anywhere, such as a back-off. ``inputs`` are the keys of its model and
    data. ``expected_seconds`` is how long it is expected to run; ``None`` if that can't be estimated.
    """

    id: str
    project: str
    priority: int
    created_at: datetime
    attempt: int
    needs: Requirements
    blocked: Wait | None = None
    inputs: frozenset[str] = frozenset()
    expected_seconds: float | None = None


@dataclass(frozen=True)
class FleetState:
    """The fleet when a pass begins. ``mean_slots`` are weighted means of the slots that projects held recently."""

    workers: tuple[LiveWorker, ...]
    load: Load
    mean_slots: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class SchedulingPlan:
    """The decisions about the jobs of one page, each in the order in which the jobs were considered."""

    placements: Sequence[tuple[WaitingJob, Placement]]
    waits: Sequence[tuple[WaitingJob, Wait]]


class Planner:
    """Plans the queue page by page; a later page gets what the earlier ones have left."""

    def __init__(self, fleet: FleetState) -> None:
        self._load = fleet.load.copy()
        self._mean_slots = fleet.mean_slots
        self._reserved_slots: dict[str, int] = {}  # by project
        self._num_reservations = 0
        self._cannot_reserve: set[Requirements] = set()
        self._options: dict[Requirements, list[Option] | Wait] = {}  # the available ones
        self._idle_options: dict[Requirements, list[Option]] = {}  # those that had enough free slots for the last job
        self.candidates = [Candidate.of(worker) for worker in fleet.workers]

    def share(self, project: str) -> float:
        """The share of the project, including what it gets in this plan."""
        held = self._load.held_slots[project] + self._reserved_slots.get(project, 0)
        return self._mean_slots.get(project, 0.0) + held

    def available(self, needs: Requirements) -> list[Option] | Wait:
        """The available options for such jobs. Whether they have enough free slots depends on the plan so far."""
        if needs not in self._options:
            self._options[needs] = available_options(self.candidates, needs)
        return self._options[needs]

    def plan(self, jobs: Iterable[WaitingJob]) -> SchedulingPlan:
        placements: list[tuple[WaitingJob, Placement]] = []
        waits: list[tuple[WaitingJob, Wait]] = []
        known_waits: dict[Requirements, Wait] = {}  # until a slot is taken
        quota_waits: dict[tuple[str, Requirements], Wait] = {}
        for job in in_fair_order(jobs, self.share):
            if job.blocked is not None:
                waits.append((job, job.blocked))
                continue
            known_wait = known_waits.get(job.needs) or quota_waits.get((job.project, job.needs))
            choice = known_wait or self._choose(job)
            if isinstance(choice, Wait) and choice.code is WaitingCode.QUOTA:
                waits.append((job, choice))
            elif isinstance(choice, Wait):
                known_waits[job.needs] = choice
                waits.append((job, choice))
                if self._reserve(job):
                    known_waits.clear()
            elif quota_wait := self._load.quota_wait(job.project, choice.total_gpus):
                quota_waits[job.project, job.needs] = quota_wait
                waits.append((job, quota_wait))
            else:
                known_waits.clear()
                choice.take()
                if any(node.candidate.shares_gpus for node in choice.nodes):
                    # An option names one slot for each GPU, a free one if there is one.
                    self._options.clear()
                    self._idle_options.clear()
                num_slots = 0 if job.needs.is_background else sum(len(node.slots) for node in choice.nodes)
                self._load.add(job.project, choice.total_gpus, num_slots)
                placements.append((job, choice))
        return SchedulingPlan(placements, waits)

    def _choose(self, job: WaitingJob) -> Placement | Wait:
        if job.needs not in self._options and (idle := self._idle(job.needs)):
            return best_option(idle, job.needs, job.inputs).placement()
        options = self.available(job.needs)
        if isinstance(options, Wait):
            return options
        return choose_among(options, self.candidates, job.needs, job.inputs)

    def _idle(self, needs: Requirements) -> list[Option]:
        """The options with enough free slots. During a plan, slots are only taken."""
        known = self._idle_options.get(needs)
        if known is None:
            found = idle_options(self.candidates, needs)
        else:
            found = [option for option in known if option.num_missing <= 0]
        self._idle_options[needs] = found
        return found

    def _reserve(self, job: WaitingJob) -> bool:
        """Reserve slots for a job that waits, unless its project's limits keep it from starting."""
        needs = job.needs
        if needs.takes_one_slot or needs in self._cannot_reserve or self._num_reservations >= MAX_RESERVATIONS:
            return False
        options = self.available(needs)
        if isinstance(options, Wait):
            return False
        gpus = needs.resources.gpus if isinstance(needs.resources.gpus, int) else 1
        if self._load.quota_wait(job.project, gpus * min(needs.node_counts)) is not None:
            return False
        num_reserved = reserve(options, needs)
        if num_reserved is None:
            self._cannot_reserve.add(needs)
            return False
        self._num_reservations += 1
        self._reserved_slots[job.project] = self._reserved_slots.get(job.project, 0) + num_reserved
        return num_reserved > 0


def make_plan(jobs: Collection[WaitingJob], fleet: FleetState) -> SchedulingPlan:
    """The plan for a whole queue."""
    return Planner(fleet).plan(jobs)
