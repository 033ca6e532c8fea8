"""A job's training curves out of its stored progress events: arrays of equal length, each step once."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from sqlalchemy import select

from server.database.tables import EventRow
from server.service import Service
from zeta_core.contract.answers import Curves

_PROGRESS = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "epoch")
_USAGE = ("mfu", "data_wait_share", "checkpoint_blocked_share", "peak_memory_bytes")
SERIES = (*_PROGRESS, *_USAGE)
_BATCH = 2000


async def read_curves(service: Service, job_id: str, max_points: int | None) -> Curves:
    """The curves, thinned out evenly to ``max_points`` (first and last step stay)."""
    by_step: dict[int, dict[str, Any]] = {}
    attempt = 0
    query = select(EventRow.seq, EventRow.attempt, EventRow.fields)
    query = query.where(EventRow.job_id == job_id, EventRow.type == "progress").order_by(EventRow.seq).limit(_BATCH)
    after = 0
    while True:
        async with service.database.read() as session:
            rows = (await session.execute(query.where(EventRow.seq > after))).tuples().all()
        for _seq, of_attempt, fields in rows:
            step = fields.get("step")
            if not isinstance(step, int) or all(fields.get(name) is None for name in SERIES[:2]):
                continue
            if of_attempt != attempt:
                # The new attempt goes on from a checkpoint: what the one before did beyond it was thrown away.
                by_step = {earlier: point for earlier, point in by_step.items() if earlier < step}
                attempt = of_attempt
            memory: dict[str, int] = fields.get("memory") or {}
            fields = {**fields, "peak_memory_bytes": sum(memory.values()) or None}
            known = {name: fields[name] for name in SERIES if fields.get(name) is not None}
            by_step[step] = {**by_step.get(step, {}), **known}
        if len(rows) < _BATCH:
            break
        after = rows[-1][0]
    steps = thinned(sorted(by_step), max_points)
    return Curves.model_validate(
        {"step": steps, **{name: [by_step[step].get(name) for step in steps] for name in SERIES}}
    )


def thinned(steps: Sequence[int], max_points: int | None) -> list[int]:
    """At most ``max_points`` of the steps, evenly chosen, with the last one always and the first if there is room."""
    if max_points is None or len(steps) <= max_points:
        return list(steps)
    if max_points == 1:
        return [steps[-1]]
    return [steps[round(index * (len(steps) - 1) / (max_points - 1))] for index in range(max_points)]


def as_csv(curves: Curves) -> str:
    """One line for each step; what was not measured is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("step", *SERIES))
    columns = [curves.step, *(getattr(curves, name) for name in SERIES)]
    writer.writerows(zip(*columns, strict=True))
    return text.getvalue()
