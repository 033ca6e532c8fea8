"""Fair share: which project comes first among jobs of the same priority.

The share of a project is the number of slots that it holds now plus the mean number that it held recently. The mean is
exponentially weighted: what a project used one half-life ago counts half. The project with the smallest share starts
its oldest job next, and that job counts at once. So projects that always have waiting jobs hold equally many slots in
the long run, and after a burst of one project, the others come first until the means are equal.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Protocol, TypeVar

NEGLIGIBLE_SLOTS = 0.001  # a mean below this counts as 0


class Waiting(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def project(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def created_at(self) -> datetime: ...


Job = TypeVar("Job", bound=Waiting)


def updated_mean(mean: float, held_slots: float, *, elapsed_seconds: float, half_life_seconds: float) -> float:
    """The weighted mean number of slots after a time during which the project held ``held_slots``."""
    kept = 0.5 ** (max(0.0, elapsed_seconds) / half_life_seconds)
    return kept * mean + (1.0 - kept) * held_slots


def in_fair_order(jobs: Iterable[Job], share: Callable[[str], float]) -> Iterator[Job]:
    """The jobs by priority, then by the share of their project, then by age.

    ``share`` is called for a project before each of its jobs, so a job that has started counts for the next one.
    """
    by_priority: dict[int, dict[str, list[Job]]] = {}
    for job in jobs:
        by_priority.setdefault(job.priority, {}).setdefault(job.project, []).append(job)
    for _, by_project in sorted(by_priority.items(), reverse=True):
        yield from _of_one_priority(list(by_project.values()), share)


def _of_one_priority(projects: Sequence[Sequence[Job]], share: Callable[[str], float]) -> Iterator[Job]:
    queues = [deque(sorted(jobs, key=lambda job: (job.created_at, job.id))) for jobs in projects]

    def entry(number: int) -> tuple[float, datetime, str, int]:
        first = queues[number][0]
        return share(first.project), first.created_at, first.id, number

    heap = [entry(number) for number in range(len(queues))]
    heapq.heapify(heap)
    while heap:
        *_, number = heapq.heappop(heap)
        yield queues[number].popleft()
        if queues[number]:
            heapq.heappush(heap, entry(number))
