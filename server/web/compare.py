"""The page that compares jobs: their curves in the same charts, the settings that differ, and the held-out losses."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field

from server.auth import Caller
from server.http.downloads import FilePart
from server.jobs.checkpoints import file_content, find_checkpoint
from server.routes.routing import TheService
from server.service import Service
from server.web.job_text import JobView
from server.web.job_views import read_view
from server.web.pages import PageRouter, ReadPage
from zeta_core.contract.errors import InvalidRequest, NotFound, ZetaError
from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT
from zeta_core.contract.job.comparison import (
    DOCUMENT_LOSSES_FILE,
    MAX_DOCUMENT_LOSSES_BYTES,
    MIN_DOCUMENTS,
    Comparison,
    DocumentLosses,
)
from zeta_core.contract.job.comparison import compare as compare_losses
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.wire.run_directory import TRAINING_STATE_NAME

router = PageRouter()
MAX_JOBS = 8  # the number of distinguishable colours
# These fields name a job or decide when it runs; they have no effect on its model.
_NOT_COMPARED = ("entity_name", "metadata", "priority", "max_retries", "time_limit_seconds", "output_dir")


class CompareQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    job: list[str] = Field(default_factory=list[str], max_length=MAX_JOBS)


@dataclass(frozen=True)
class SettingDifference:
    """A setting and its value in each job, in the order of the jobs; ``None`` if it is unset or not decided."""

    name: str
    values: list[Any]


@dataclass(frozen=True)
class Evaluation:
    """A job's comparison with the first one, as A and B; or the reason why they can't be compared."""

    view: JobView
    comparison: Comparison | None
    fault: str | None


@router.get("/compare")
async def compare(service: TheService, page: ReadPage, query: Annotated[CompareQuery, Query()]) -> Response:
    """Compare two to eight jobs."""
    views = await _read_views(service, page.caller, query)
    return page.render("compare.html", views=views, differences=find_differences(views))


async def _read_views(service: Service, caller: Caller, query: CompareQuery) -> list[JobView]:
    """The jobs of the query. Raises `NotFound`, and `InvalidRequest` unless they are two or more trainings."""
    ids = list(dict.fromkeys(query.job))
    if len(ids) < 2:
        raise InvalidRequest("Choose at least two jobs in the list of jobs to compare them.", param="job")
    views = [await read_view(service, caller, job_id) for job_id in ids]
    for view in views:
        if view.job.kind is not JobKind.TRAINING:
            raise InvalidRequest(
                f"Job {view.job.id} is a job of kind {view.job.kind}; only trainings can be compared.",
                code="not_a_training",
                param="job",
            )
    return views


@router.get("/compare/evaluation")
async def compare_evaluation(service: TheService, page: ReadPage, query: Annotated[CompareQuery, Query()]) -> Response:
    """The differences of the held-out losses from the first job, each with its noise floor."""
    views = await _read_views(service, page.caller, query)
    rows: list[Evaluation] = []
    for other in views[1:]:
        try:
            pair = [await _document_losses(service, page.caller, view) for view in (other, views[0])]
            rows.append(Evaluation(other, await asyncio.to_thread(compare_losses, pair[0], pair[1]), None))
        except ZetaError as error:
            rows.append(Evaluation(other, None, error.message))
    return page.render("compare_evaluation.html", first=views[0], rows=rows)


async def _document_losses(service: Service, caller: Caller, view: JobView) -> DocumentLosses:
    """The losses of the final model on its held-out documents. Raises `InvalidRequest` if the job has none."""
    try:
        stored = await find_checkpoint(service, caller, view.job.id, FINAL_CHECKPOINT)
        content = file_content(stored, f"{TRAINING_STATE_NAME}/{DOCUMENT_LOSSES_FILE}")
        (part,) = content.parts
        assert isinstance(part, FilePart)
        if part.num_bytes > MAX_DOCUMENT_LOSSES_BYTES:
            raise ValueError(f"{part.num_bytes} bytes are too many")  # no run writes so much, unless it was taken over
        return DocumentLosses.model_validate_json(await asyncio.to_thread(part.read))
    except (NotFound, ValueError, OSError) as error:
        raise InvalidRequest(
            f"{view.name} has no losses of single documents. Runs that have succeeded with at least {MIN_DOCUMENTS} "
            "held-out documents (eval_split or eval_dataset) store them.",
            code="no_document_losses",
        ) from error


def find_differences(views: Sequence[JobView]) -> list[SettingDifference]:
    """The settings that affect training and are not the same in all jobs."""
    resolved = [view.job.resolved_spec.as_json() for view in views]
    differences: list[SettingDifference] = []
    for name in JobSpec.model_fields:
        values = [spec.get(name) for spec in resolved]
        if name not in _NOT_COMPARED and any(value != values[0] for value in values):
            differences.append(SettingDifference(name, values))
    return differences
