"""The losses of a job at a step, from its stored progress."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sqlalchemy import ColumnElement, Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import EventRow
from zeta_core.contract.job.events import LOSS_WINDOW_STEPS

MAX_LINES = 4 * LOSS_WINDOW_STEPS  # of progress around the step; repeated steps of several attempts are included


@dataclass(frozen=True)
class StepLosses:
    """The losses of a job at a step; ``None`` if it has none, or one that is not finite.

    ``eval_loss`` is the newest one on held-out data, and ``loss`` the mean over the last `LOSS_WINDOW_STEPS` steps.
    """

    eval_loss: float | None
    loss: float | None


async def losses_at(session: AsyncSession, job_id: str, step: int) -> StepLosses:
    return StepLosses(await _eval_loss(session, job_id, step), await _mean_loss(session, job_id, step))


async def _eval_loss(session: AsyncSession, job_id: str, step: int) -> float | None:
    evaluated = _progress(job_id).where(EventRow.fields["eval_loss"].as_float().is_not(None), _step() <= step)
    fields = await session.scalar(evaluated.order_by(EventRow.seq.desc()).limit(1))
    return None if fields is None else _finite(fields["eval_loss"])


async def _mean_loss(session: AsyncSession, job_id: str, step: int) -> float | None:
    """The mean over the reported steps of the window; a line of later steps may contain them one by one.

    Late in a fast run, one line covers more steps than the window. Then its mean is the loss.
    """
    first = step - LOSS_WINDOW_STEPS + 1
    lines = await session.scalars(_progress(job_id).where(_step() >= first).order_by(EventRow.seq).limit(MAX_LINES))
    by_step: dict[int, Any] = {}
    for fields in lines:
        for values in (fields, *(fields.get("steps") or [])):  # a single step overrides the mean over several
            if values.get("loss") is not None:
                by_step[values["step"]] = values["loss"]
    window = [loss for reported, loss in by_step.items() if first <= reported <= step]
    later = [by_step[reported] for reported in sorted(by_step) if reported > step]
    losses = [_finite(loss) for loss in window or later[:1]]
    known = [loss for loss in losses if loss is not None]
    return fmean(known) if known and len(known) == len(losses) else None


def _progress(job_id: str) -> Select[dict[str, Any]]:  # pyright: ignore[reportInvalidTypeArguments]
    return select(EventRow.fields).where(EventRow.job_id == job_id, EventRow.type == "progress")


def _step() -> ColumnElement[int]:
    return EventRow.fields["step"].as_integer()


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
