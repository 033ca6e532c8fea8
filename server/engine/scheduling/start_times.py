"""Estimates when waiting jobs start, from the expected ends of running jobs and of the jobs ahead in the queue.

An estimate exists only if each of these times is known: the remaining time that a training reports, or a time limit.
The jobs take their slots in the order of the plan, as if no further job were submitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from server.engine.candidate import Candidate, Option
from server.engine.scheduling.plan import Planner, SchedulingPlan, WaitingJob
from zeta_core.contract.job.status import WaitingCode

MAX_STEPS = 20_000  # workers looked at, over all jobs: the estimates take about a tenth of a second at most
MAX_SECONDS = 366 * 86_400.0  # estimates beyond this are omitted
UNKNOWN = float("inf")
_ESTIMATED = frozenset({WaitingCode.WORKERS_BUSY, WaitingCode.RESOURCES})


def estimated_starts(plan: SchedulingPlan, planner: Planner) -> Mapping[str, float]:
    """The seconds until jobs of the plan start, by job; jobs whose start can't be estimated are missing.

    ``planner`` has just made the plan.
    """
    timeline = _Timeline(plan, planner.candidates)
    waiting = [job for job, wait in plan.waits if wait.code in _ESTIMATED]
    starts: dict[str, float] = {}
    for job in waiting[: MAX_STEPS // max(1, len(planner.candidates))]:
        if not timeline.has_known_times:
            break
        options = planner.available(job.needs)
        if isinstance(options, list) and (start := timeline.take(options, job)) < MAX_SECONDS:
            starts[job.id] = start
    return starts


class _Timeline:
    """When each slot becomes free, in seconds from now."""

    def __init__(self, plan: SchedulingPlan, candidates: Sequence[Candidate]) -> None:
        self._free_at: dict[tuple[str, int], float] = {}
        for candidate in candidates:
            live = candidate.live
            for slot in live.heartbeat.slots:
                at = 0.0 if slot.slot in live.free else live.seconds_left.get(slot.slot, UNKNOWN)
                # A job ahead takes the reserved slots at an unknown time if the end of another one is unknown.
                is_blocked = slot.slot in candidate.reserved and candidate.reserved[slot.slot] is None
                self._free_at[live.heartbeat.worker, slot.slot] = UNKNOWN if is_blocked else at
        for job, placement in plan.placements:
            for node in placement.nodes:
                for slot in node.slots:
                    self._free_at[node.candidate.heartbeat.worker, slot] = _end(0.0, job)

    @property
    def has_known_times(self) -> bool:
        return any(at < UNKNOWN for at in self._free_at.values())

    def take(self, options: Sequence[Option], job: WaitingJob) -> float:
        """Let the job take the slots where it can start first; returns that time, or `UNKNOWN`."""
        num_nodes = min(job.needs.node_counts)
        chosen: list[tuple[float, list[tuple[str, int]]]] = []
        by_kind = sorted(options, key=_kind)
        for _, kind in groupby(by_kind, _kind):
            nodes = sorted((self._first_slots(option) for option in kind), key=lambda node: node[0])[:num_nodes]
            if len(nodes) == num_nodes:
                chosen.append((nodes[-1][0], [slot for _, slots in nodes for slot in slots]))
        start, slots = min(chosen, key=lambda node: node[0], default=(UNKNOWN, list[tuple[str, int]]()))
        if start < UNKNOWN:
            self._free_at.update(dict.fromkeys(slots, _end(start, job)))
        return start

    def _first_slots(self, option: Option) -> tuple[float, list[tuple[str, int]]]:
        """The slots of this worker on which the job can start first, and the time when all of them are free."""
        slots = [(option.worker, slot.slot) for slot in option.group.slots if slot.problem is None]
        slots.sort(key=lambda slot: self._free_at.get(slot, UNKNOWN))
        first = slots[: option.group.needed]
        is_enough = len(first) == option.group.needed
        return (max(self._free_at.get(slot, UNKNOWN) for slot in first) if is_enough and first else UNKNOWN), first


def _end(start: float, job: WaitingJob) -> float:
    return UNKNOWN if job.expected_seconds is None else start + job.expected_seconds


def _kind(option: Option) -> tuple[str, int]:
    return option.group.device_kind or "", option.group.gpus
