"""The spans of a job from its submission to its first step, from the times that the database has stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from server.tracing.tracing import FinishedSpan

LOADING = "loading_model"
AFTER_LOADING = frozenset({"finding_learning_rate", "training", "evaluating"})


@dataclass(frozen=True)
class JobStart:
    """The times of a job's first attempt. ``phases`` maps the phases that were reported to their first report."""

    created_at: datetime
    dispatched_at: datetime
    started_at: datetime
    phases: Mapping[str, datetime]
    ended_at: datetime  # of the first step, or of the attempt if it ended before
    failure: str | None = None  # the reason, if the attempt ended before its first step


def job_spans(start: JobStart) -> Sequence[FinishedSpan]:
    """The parts of the start in their order. A part that was not reached is omitted.

    The first three times are of servers and the others of the worker, so a difference of their clocks shifts the end
    of ``preparation``.
    """
    loading = start.phases.get(LOADING)
    training = min((time for phase, time in start.phases.items() if phase in AFTER_LOADING), default=None)
    names = ("queue wait", "dispatch", "preparation", "model load", "first step")
    times = [start.created_at, start.dispatched_at, start.started_at, *(time for time in (loading, training) if time)]
    ends = [*times[1:], start.ended_at]
    spans = [FinishedSpan(name, begin, max(begin, end)) for name, begin, end in zip(names, times, ends, strict=False)]
    if start.failure is not None:
        last = spans[-1]
        spans[-1] = FinishedSpan(last.name, last.start, last.end, error=start.failure)
    return spans
