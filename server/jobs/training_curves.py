"""Builds a job's training curves from its stored progress events: arrays of equal length, one entry per step."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import select

from server.database.tables import EventRow
from server.service import Service
from zeta_core.contract.job.responses import Curves

SERIES = tuple(name for name in Curves.model_fields if name not in ("object", "step"))
_BATCH = 2000


async def read_curves(service: Service, job_id: str, max_points: int | None) -> Curves:
    """The curves, reduced evenly to ``max_points``; the ends and, if possible, evaluations are kept."""
    by_step: dict[int, dict[str, Any]] = {}
    attempt = 0
    query = select(EventRow.seq, EventRow.attempt, EventRow.fields)
    query = query.where(EventRow.job_id == job_id, EventRow.type == "progress").order_by(EventRow.seq).limit(_BATCH)
    after = 0
    while True:
        async with service.database.read() as session:
            rows = (await session.execute(query.where(EventRow.seq > after))).tuples().all()
        for _seq, event_attempt, fields in rows:
            step = fields.get("step")
            if not isinstance(step, int) or (fields.get("loss") is None and fields.get("eval_loss") is None):
                continue
            single_steps: list[dict[str, Any]] = fields.get("steps") or []
            if event_attempt != attempt:
                # The new attempt resumed from a checkpoint; later steps of the previous attempt were discarded.
                first = min([step, *(values["step"] for values in single_steps)])
                by_step = {earlier: point for earlier, point in by_step.items() if earlier < first}
                attempt = event_attempt
            for values in (fields, *single_steps):  # values of single steps override the means over several steps
                by_step[values["step"]] = {**by_step.get(values["step"], {}), **curve_values(values)}
        if len(rows) < _BATCH:
            break
        after = rows[-1][0]
    evaluated = {step for step, point in by_step.items() if "eval_loss" in point}
    steps = thin_out(sorted(by_step), max_points, evaluated)
    return Curves.model_validate(
        {"step": steps, **{name: [by_step[step].get(name) for step in steps] for name in SERIES}}
    )


def curve_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a progress event, by the names of the curves."""
    memory: dict[str, int] = fields.get("memory") or {}
    rewards: dict[str, float] = fields.get("rewards") or {}
    prefix = "rewards" if fields.get("eval_loss") is None else "eval_rewards"
    values = {**fields, **{f"{prefix}_{name}": value for name, value in rewards.items()}}
    values["peak_memory_bytes"] = sum(memory.values()) or None
    return {name: values[name] for name in SERIES if values.get(name) is not None}


def thin_out(steps: Sequence[int], max_points: int | None, marked: Collection[int] = ()) -> list[int]:
    """At most ``max_points`` of the steps, evenly spaced, including the last one and, for two or more, the first.

    A step in ``marked`` replaces a chosen step near it, so that rare values are not lost.
    """
    if max_points is None or len(steps) <= max_points:
        return list(steps)
    if max_points == 1:
        return [steps[-1]]
    distance = (len(steps) - 1) / (max_points - 1)
    chosen = [round(point * distance) for point in range(max_points)]
    for index, step in enumerate(steps):
        point = round(index / distance)
        if step in marked and 0 < point < max_points - 1:
            chosen[point] = index
    return [steps[index] for index in chosen]


def as_csv(curves: Curves) -> str:
    """One line for each step; missing values are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("step", *SERIES))
    columns = [curves.step, *(getattr(curves, name) for name in SERIES)]
    writer.writerows(zip(*columns, strict=True))
    return text.getvalue()
