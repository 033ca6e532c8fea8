"""The training curves of a job as points for charts, reduced to the resolution of a screen.

The points are read once from the progress events and kept in memory, and later requests read only newer events. So a
range of a long curve is answered quickly. They are the values that `training_curves` returns, each with its step; two
further curves, ``tokens`` and ``seconds``, convert steps to the other x axes.

A reduced curve has the smallest and the largest value of each of many equal parts, so no spike is lost, and also the
mean of each part, from which the browser draws the smoothed line.
"""

from __future__ import annotations

import asyncio
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal

from sqlalchemy import select

from server.auth import Caller
from server.database.tables import AttemptRow, EventRow
from server.jobs.queries import find_job
from server.jobs.training_curves import SERIES, curve_values
from server.service import Service

XAxis = Literal["step", "tokens", "seconds"]
DEFAULT_POINTS = 2000
MAX_KEPT_POINTS = 4_000_000  # in all jobs; a point takes 16 bytes
MAX_KEPT_JOBS = 1000  # with or without points
MAX_KEPT_REDUCTIONS = 8  # of a job with a long curve, for its viewers, who see the same ranges
LONG_CURVE = 20_000  # points
_BATCH = 2000


@dataclass
class CurvePoints:
    """A curve's points in the order of their steps, each step once."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def put(self, step: int, value: float) -> None:
        """Add the point, or replace the one of this step."""
        if not self.steps or step > self.steps[-1]:
            self.steps.append(step)
            self.values.append(value)
            return
        index = bisect_left(self.steps, step)
        if self.steps[index] == step:
            self.values[index] = value
        else:
            self.steps.insert(index, step)
            self.values.insert(index, value)

    def truncate(self, first_step: int) -> None:
        """Remove the points from ``first_step`` on."""
        index = bisect_left(self.steps, first_step)
        del self.steps[index:], self.values[index:]

    def at(self, step: int) -> float | None:
        """The value at the step, or at the nearest one before it."""
        index = bisect_right(self.steps, step)
        return self.values[index - 1] if index else None


@dataclass
class Restart:
    """The first step of an attempt after the first one."""

    attempt: int
    step: int


@dataclass(frozen=True)
class ChartQuery:
    """The curves to draw: their names, the x axis, and the range on it; ``None`` is the whole curve."""

    names: tuple[str, ...] = SERIES
    x: XAxis = "step"
    first: float | None = None
    last: float | None = None
    max_points: int = DEFAULT_POINTS


@dataclass
class JobPoints:
    """All points of one job up to the event ``last_seq``."""

    curves: dict[str, CurvePoints] = field(
        default_factory=lambda: {name: CurvePoints() for name in (*SERIES, "seconds")}
    )
    restarts: list[Restart] = field(default_factory=list[Restart])
    last_seq: int = 0
    attempt: int = 0
    origin: datetime | None = None  # the time of the first progress event
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    reductions: dict[ChartQuery, dict[str, dict[str, Any]]] = field(
        default_factory=dict[ChartQuery, dict[str, dict[str, Any]]]
    )

    @property
    def num_points(self) -> int:
        return sum(len(curve.steps) for curve in self.curves.values())

    def add(self, attempt: int, created_at: datetime, fields: Mapping[str, Any]) -> None:
        """Add the values of a progress event, if it has any. See `training_curves.read_curves`."""
        step = fields.get("step")
        if not isinstance(step, int) or (fields.get("loss") is None and fields.get("eval_loss") is None):
            return
        singles: list[dict[str, Any]] = fields.get("steps") or []
        first = min([step, *(values["step"] for values in singles)])
        self.origin = self.origin or created_at
        if attempt != self.attempt:
            for curve in self.curves.values():
                curve.truncate(first)
            self.restarts = [restart for restart in self.restarts if restart.step < first]
            if self.attempt:
                self.restarts.append(Restart(attempt, first))
            self.attempt = attempt
        for values in (fields, *singles):
            for name, value in curve_values(values).items():
                self.curves[name].put(values["step"], value)
        self._add_seconds((created_at - self.origin).total_seconds(), [v["step"] for v in singles] or [step])

    def _add_seconds(self, end: float, steps: list[int]) -> None:
        """The times of the steps of one event, spread evenly since the previous event."""
        seconds = self.curves["seconds"]
        start = min(seconds.at(steps[0] - 1) or 0.0, end)
        for number, step in enumerate(steps, start=1):
            seconds.put(step, start + (end - start) * number / len(steps))


class ChartPoints:
    """The points of the jobs that were requested recently."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._jobs: OrderedDict[str, JobPoints] = OrderedDict()

    async def read(self, caller: Caller, job_id: str, query: ChartQuery) -> dict[str, Any]:
        """The requested curves as ``{"last_seq", "curves": {name: {"x", "y"}}, "restarts", ...}``.

        On another axis than steps, a curve also has its ``steps``. A reduced curve also has the ``means`` of its parts,
        in the same form. Every event up to ``last_seq`` is included. Raises `NotFound`.
        """
        async with self._service.database.read() as session:
            job = await find_job(session, caller, job_id)
            attempts = {
                row.attempt: row for row in await session.scalars(select(AttemptRow).where(AttemptRow.job_id == job_id))
            }
            last_seq, status = job.last_seq, job.status
        points = self._jobs.setdefault(job_id, JobPoints())
        self._jobs.move_to_end(job_id)
        async with points.lock:
            await self._update(job_id, points, last_seq)
            curves = await self._reduce(points, query)
        self._forget_oldest()
        seconds = points.curves["seconds"]
        return {
            "last_seq": points.last_seq,
            "status": status,
            "attempt": points.attempt,
            "last_step": seconds.steps[-1] if seconds.steps else None,
            "last_seconds": seconds.values[-1] if seconds.values else None,
            "origin": points.origin.isoformat() if points.origin else None,
            "curves": curves,
            "restarts": [
                {
                    "attempt": restart.attempt,
                    "step": restart.step,
                    "x": _position(points, query.x, restart.step),
                    "reason": before.reason if (before := attempts.get(restart.attempt - 1)) else None,
                }
                for restart in points.restarts
            ],
        }

    async def _reduce(self, points: JobPoints, query: ChartQuery) -> dict[str, dict[str, Any]]:
        """The reduced curves; those of a long curve are kept until it grows."""
        kept = points.reductions.get(query)
        if kept is not None:
            return kept
        curves = await asyncio.to_thread(reduced_curves, points, query)
        if points.num_points > LONG_CURVE:
            if len(points.reductions) >= MAX_KEPT_REDUCTIONS:
                del points.reductions[next(iter(points.reductions))]
            points.reductions[query] = curves
        return curves

    async def _update(self, job_id: str, points: JobPoints, last_seq: int) -> None:
        """Read the progress events up to ``last_seq`` that `points` doesn't contain yet."""
        columns = (EventRow.seq, EventRow.attempt, EventRow.created_at, EventRow.fields)
        query = select(*columns).where(EventRow.job_id == job_id, EventRow.type == "progress")
        while points.last_seq < last_seq:
            between = query.where(EventRow.seq > points.last_seq, EventRow.seq <= last_seq)
            async with self._service.database.read() as session:
                rows = (await session.execute(between.order_by(EventRow.seq).limit(_BATCH))).tuples().all()
            if rows:
                points.reductions.clear()
            for _seq, attempt, created_at, fields in rows:
                points.add(attempt, created_at, fields)
            points.last_seq = rows[-1][0] if len(rows) == _BATCH else last_seq

    def _forget_oldest(self) -> None:
        total = sum(points.num_points for points in self._jobs.values())
        while len(self._jobs) > MAX_KEPT_JOBS or (len(self._jobs) > 1 and total > MAX_KEPT_POINTS):
            _, removed = self._jobs.popitem(last=False)
            total -= removed.num_points


def reduced_curves(points: JobPoints, query: ChartQuery) -> dict[str, dict[str, Any]]:
    """The curves that have values, on the requested axis and in the requested range."""
    first, last = _steps_of_range(points, query)
    curves: dict[str, dict[str, Any]] = {}
    for name in query.names:
        curve = points.curves[name]
        if curve.steps:
            start, stop = bisect_left(curve.steps, first), bisect_right(curve.steps, last)
            chosen = reduce_curve(curve.values, start, stop, query.max_points)
            curves[name] = _on_axis(points, query.x, ((curve.steps[index], curve.values[index]) for index in chosen))
            if stop - start > query.max_points:
                parts = _parts(start, stop, query.max_points)
                means = ((curve.steps[(low + high) // 2], fmean(curve.values[low:high])) for low, high in parts)
                curves[name]["means"] = _on_axis(points, query.x, means)
    return curves


def _on_axis(points: JobPoints, x: XAxis, values: Iterable[tuple[int, float]]) -> dict[str, Any]:
    """Values by step as coordinates; those whose position on the axis is unknown are omitted."""
    known = [(p, step, value) for step, value in values if (p := _position(points, x, step)) is not None]
    coordinates = {"x": [p for p, _, _ in known], "y": [value for _, _, value in known]}
    return coordinates if x == "step" else {**coordinates, "steps": [step for _, step, _ in known]}


def reduce_curve(values: array[float], start: int, stop: int, max_points: int) -> Iterable[int]:
    """The indexes of at most ``max_points`` values of a range: its ends, and the extremes of many equal parts."""
    if stop - start <= max_points:
        return range(start, stop)
    chosen = {start, stop - 1}
    for low, high in _parts(start, stop, max_points):
        piece = values[low:high]
        chosen.update((low + piece.index(min(piece)), low + piece.index(max(piece))))
    return sorted(chosen)


def _parts(start: int, stop: int, max_points: int) -> Iterator[tuple[int, int]]:
    """The first index of each part of a range, and the one after its last; two points of each part are drawn."""
    num_parts = max(1, (max_points - 2) // 2)
    bounds = [start + part * (stop - start) // num_parts for part in range(num_parts + 1)]
    yield from pairwise(bounds)


def _steps_of_range(points: JobPoints, query: ChartQuery) -> tuple[float, float]:
    """The first and the last step of the requested range."""
    first = float("-inf") if query.first is None else query.first
    last = float("inf") if query.last is None else query.last
    if query.x == "step":
        return first, last
    axis = points.curves[query.x]
    start, stop = bisect_left(axis.values, first), bisect_right(axis.values, last)
    return (
        axis.steps[start] if start < len(axis.steps) else float("inf"),
        axis.steps[stop - 1] if stop else float("-inf"),
    )


def _position(points: JobPoints, x: XAxis, step: int) -> float | None:
    return step if x == "step" else points.curves[x].at(step)
