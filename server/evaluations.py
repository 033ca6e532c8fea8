"""Creates evaluations: jobs that measure how well a checkpoint predicts the documents of a file."""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.checkpoints import LATEST, checkpoints_newest_first
from server.database.tables import CheckpointRow, JobRow
from server.jobs.queries import find_training
from server.openai.answer_weights import BASE, find_weights
from server.service import Service
from server.submitting.submissions import CreatedJob, SubmissionOrigin, Submissions, find_created_job, identify_request
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.spec.evaluation_spec import NewEvaluation
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.sources import dataset_sources
from zeta_core.contract.spec.validation import parse, shown
from zeta_core.contract.wire.answers import ServedWeights

# The settings of a data source that determine how its rows are read.
_ROW_SETTINGS = ("format", "columns", "drop_columns", "dtype", "drop_fields", "allow_control_tokens")


async def create(
    service: Service, submissions: Submissions, caller: Caller, job_id: str, body: Any, idempotency_key: str | None
) -> CreatedJob:
    """Create the evaluation, or return the one that an earlier, equal request created.

    Raises `NotFound` for a job that the caller can't see or that is not a training, and subclasses of `InvalidRequest`.
    """
    identity = identify_request(idempotency_key, {"evaluate": job_id, "body": body})
    created = await find_created_job(service, caller, identity)
    if created is not None:
        return created, True
    async with service.database.read() as session:
        job = await find_training(session, caller, job_id)
        request = parse(NewEvaluation, body, error_class=InvalidRequest)
        checkpoint = await _checkpoint(session, job, request.checkpoint)
    trained = _spec_with_token_loss(job)
    weights = await _weights(service, caller, f"{job_id}/{checkpoint}", param="checkpoint")
    base = await _weights(service, caller, f"{job_id}/{BASE}", param="base") if request.base else None
    spec: dict[str, Any] = {
        "model": weights.model,
        "fingerprint": weights.fingerprint,
        "quantize": weights.quantize,
        "base": None if base is None else base.model,
        "dataset": {"file": request.file, **_row_settings(trained)},
        "seq_len": job.resolved_spec.value("seq_len"),
        "use_pretokenized": trained.use_pretokenized,
        "train_on": trained.train_on,
        "overlong": trained.overlong,
        "template_date": job.resolved_spec.value("template_date"),
        **request.model_dump(mode="json", include={"entity_name", "priority", "max_retries", "metadata"}),
    }
    return await submissions.create(caller, spec, identity, SubmissionOrigin(kind=JobKind.EVALUATION))


async def _checkpoint(session: AsyncSession, job: JobRow, requested: str) -> str:
    """The name of the requested checkpoint, with ``latest`` resolved."""
    if requested == LATEST:
        name = await session.scalar(checkpoints_newest_first(job.id).limit(1))
    else:
        row = await session.get(CheckpointRow, (job.id, requested))
        name = None if row is None else row.name
    if name is None:
        raise InvalidRequest(
            f"checkpoint is {shown(requested)}, but {job.id} has no such checkpoint; list its checkpoints with "
            f"`zeta checkpoints {job.id}` or GET /v1/jobs/{job.id}/checkpoints.",
            code="checkpoint_not_found",
            param="checkpoint",
        )
    return name


def _spec_with_token_loss(job: JobRow) -> JobSpec:
    """The spec of the job. Raises `InvalidRequest` for a job without a loss per token."""
    spec = JobSpec.model_validate(job.spec)
    if spec.method != "sft":
        raise InvalidRequest(
            f"{job.id} was trained with method {spec.method!r}, which has no loss per token, so it can't be evaluated "
            "on a file; see its rewards with `zeta plot`.",
            code="cannot_evaluate",
        )
    return spec


async def _weights(service: Service, caller: Caller, name: str, *, param: str) -> ServedWeights:
    try:
        return await find_weights(service, caller, name)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, code="cannot_evaluate", param=param) from error


def _row_settings(spec: JobSpec) -> dict[str, Any]:
    """How the rows of the job's held-out data are read, or else of its training data; if sources differ, the defaults.

    The job has trained, so its sources have valid settings.
    """
    sources = dataset_sources(spec.eval_dataset) or dataset_sources(spec.dataset)
    settings = [source.model_dump(mode="json", include=set(_ROW_SETTINGS)) for source in sources]
    return settings[0] if settings and all(each == settings[0] for each in settings) else {}
