"""The page of all sample texts of a job, by prompt, so that one sees how the answers change over the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select, text

from server.database.tables import IS_RARE_EVENT, EventRow
from server.routes.routing import TheService
from server.service import Service
from server.web.job_views import read_view
from server.web.pages import PageRouter, ReadPage

router = PageRouter()
SAMPLES_PER_PAGE = 200


class SampleQuery(BaseModel):
    """``before``: the ``seq`` of the oldest sample of the previous page."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    before: int | None = Field(default=None, ge=1, lt=2**53)


@dataclass(frozen=True)
class Sample:
    seq: int
    attempt: int
    step: int
    prompt: str
    text: str


@router.get("/jobs/{job_id}/samples")
async def show_samples(
    service: TheService, page: ReadPage, job_id: str, query: Annotated[SampleQuery, Query()]
) -> Response:
    """The sample texts of each prompt, newest first."""
    view = await read_view(service, page.caller, job_id)
    found = await _read_samples(service, job_id, query.before, SAMPLES_PER_PAGE + 1)
    shown = found[:SAMPLES_PER_PAGE]
    return page.render(
        "job_samples.html",
        view=view,
        tab="samples",
        prompts=group_by_prompt(shown),
        before=query.before,
        following=shown[-1].seq if len(found) > SAMPLES_PER_PAGE else None,
    )


def group_by_prompt(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """The samples of each prompt, in their order."""
    prompts: dict[str, list[Sample]] = {}
    for sample in samples:
        prompts.setdefault(sample.prompt, []).append(sample)
    return prompts


async def _read_samples(service: Service, job_id: str, before: int | None, limit: int) -> list[Sample]:
    """Up to ``limit`` samples with a ``seq`` below ``before``, newest first."""
    query = select(EventRow).where(EventRow.job_id == job_id, EventRow.type == "sample", text(IS_RARE_EVENT))
    if before is not None:
        query = query.where(EventRow.seq < before)
    async with service.database.read() as session:
        rows = await session.scalars(query.order_by(EventRow.seq.desc()).limit(limit))
        return [_to_sample(row) for row in rows]


def _to_sample(row: EventRow) -> Sample:
    fields: dict[str, Any] = row.fields
    return Sample(row.seq, row.attempt, fields["step"], fields["prompt"], fields["text"])
