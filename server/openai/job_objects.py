"""Fine-tuning jobs as the `openai` client reads them, converted from jobs of this service."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from server.database.tables import JobRow
from server.openai.fine_tuning_request import AUTO, Auto
from server.openai.model_names import base_model_of, fine_tuned_model
from server.openai.result_file_ids import result_file_ids
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.job import Job, WaitingReason
from zeta_core.contract.job.status import ENDED, JobStatus, RequestedAction, StatusReason
from zeta_core.contract.spec.resolved_spec import RecordedSpec

FineTuningStatus = Literal[
    "validating_files", "queued", "running", "succeeded", "failed", "cancelled", "paused", "pausing"
]


class _Object(BaseModel):
    model_config = ConfigDict(frozen=True)


class FineTuningError(_Object):
    code: str
    message: str
    param: str | None


class Hyperparameters(_Object):
    """The values in use; ``auto`` until they are decided."""

    batch_size: int | Auto | None
    learning_rate_multiplier: float | Auto | None
    n_epochs: int | Auto | None


class PreferenceHyperparameters(Hyperparameters):
    beta: float | Auto | None


class SupervisedMethodObject(_Object):
    hyperparameters: Hyperparameters


class DpoMethodObject(_Object):
    hyperparameters: PreferenceHyperparameters


class MethodObject(_Object):
    type: Literal["supervised", "dpo"]
    supervised: SupervisedMethodObject | None = None
    dpo: DpoMethodObject | None = None


class WandbObject(_Object):
    project: str
    entity: str | None
    name: str | None
    tags: list[str]


class IntegrationObject(_Object):
    type: Literal["wandb"] = "wandb"
    wandb: WandbObject


class NativeState(_Object):
    """The state of the job in this service, and its spec with all defaults."""

    status: JobStatus
    status_reason: StatusReason | None
    requested_action: RequestedAction | None
    waiting_reason: WaitingReason | None
    queue_position: int | None
    progress: dict[str, Any] | None
    warnings: list[Any]
    resolved_spec: RecordedSpec


class FineTuningJob(_Object):
    """Times are Unix times in seconds. ``zeta`` is an addition to OpenAI's fields."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: FineTuningError | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: Hyperparameters
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: FineTuningStatus
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    estimated_finish: int | None
    integrations: list[IntegrationObject]
    metadata: dict[str, str] | None
    method: MethodObject
    zeta: NativeState


def to_fine_tuning_job(row: JobRow, job: Job) -> FineTuningJob:
    """The object of a job, whichever interface has created it. ``job`` is converted from ``row``."""
    method = _method(row, job)
    hyperparameters = method.supervised or method.dpo
    assert hyperparameters is not None
    values = hyperparameters.hyperparameters
    resolved = job.resolved_spec
    is_ended = job.status in ENDED
    return FineTuningJob(
        id=job.id,
        created_at=_seconds(job.created_at),
        error=_error(job),
        fine_tuned_model=fine_tuned_model(row) if job.status == JobStatus.SUCCEEDED else None,
        finished_at=_seconds(job.finished_at) if job.finished_at is not None else None,
        hyperparameters=Hyperparameters(
            batch_size=values.batch_size,
            learning_rate_multiplier=values.learning_rate_multiplier,
            n_epochs=values.n_epochs,
        ),
        model=base_model_of(row),
        organization_id=job.project,
        result_files=result_file_ids(job) if is_ended else [],
        seed=resolved.seed or 0,
        status=_status(job),
        trained_tokens=job.result.tokens if is_ended and job.result is not None else None,
        training_file=_file(job.spec.get("dataset")) or "",
        validation_file=_file(job.spec.get("eval_dataset")),
        estimated_finish=_estimated_finish(job),
        integrations=_integrations(job),
        metadata=dict(job.metadata),
        method=method,
        zeta=NativeState(
            status=job.status,
            status_reason=job.status_reason,
            requested_action=job.requested_action,
            waiting_reason=job.waiting_reason,
            queue_position=job.queue_position,
            progress=job.progress,
            warnings=job.warnings,
            resolved_spec=resolved,
        ),
    )


def _status(job: Job) -> FineTuningStatus:
    if job.requested_action == "pause":
        return "pausing"
    if job.status == JobStatus.RUNNING and (job.progress or {}).get("phase") in ("fetching", "loading_data"):
        return "validating_files"
    return job.status.value


def _error(job: Job) -> FineTuningError | None:
    if job.error is None:
        return None
    message = " ".join(part for part in (job.error.message, job.error.hint) if part)
    param = "training_file" if job.status_reason == StatusReason.INVALID_DATA else None
    return FineTuningError(code=job.error.code, message=message, param=param)


def _method(row: JobRow, job: Job) -> MethodObject:
    resolved = job.resolved_spec
    values: dict[str, Any] = {
        "batch_size": resolved.global_batch_size or AUTO,
        "learning_rate_multiplier": _multiplier(row, job),
        "n_epochs": _epochs(job),
    }
    if resolved.value("method") != "dpo":
        supervised = SupervisedMethodObject(hyperparameters=Hyperparameters(**values))
        return MethodObject(type="supervised", supervised=supervised)
    dpo: Any = resolved.value("dpo")
    beta = float(dpo["beta"]) if isinstance(dpo, dict) and "beta" in dpo else None
    return MethodObject(type="dpo", dpo=DpoMethodObject(hyperparameters=PreferenceHyperparameters(**values, beta=beta)))


def _epochs(job: Job) -> int | Auto | None:
    """``None`` if `max_steps` sets the length, or for a fraction of an epoch, which the client's type can't express."""
    epochs = job.resolved_spec.epochs
    if epochs is None or not float(epochs).is_integer():
        return None
    return int(epochs)


def _multiplier(row: JobRow, job: Job) -> float | Auto | None:
    """The learning rate relative to the default of the base model; ``None`` if there is no default."""
    if row.openai_request is None:
        return None
    base: Any = row.openai_request.get("base_learning_rate")
    rate = job.resolved_spec.learning_rate
    if not isinstance(base, float) or base <= 0:
        return None
    return AUTO if rate is None else float(f"{rate / base:.6g}")


def _estimated_finish(job: Job) -> int | None:
    seconds = (job.progress or {}).get("eta_seconds")
    if job.status != JobStatus.RUNNING or not isinstance(seconds, int | float):
        return None
    return _seconds(utc_now() + timedelta(seconds=seconds))


def _integrations(job: Job) -> list[IntegrationObject]:
    if "wandb" not in job.spec.get("report_to", []):
        return []
    wandb: dict[str, Any] = job.spec.get("wandb") or {}
    settings = WandbObject(
        project=wandb.get("project", "zeta"),
        entity=wandb.get("entity"),
        name=wandb.get("name") or job.entity_name or job.id,
        tags=wandb.get("tags", []),
    )
    return [IntegrationObject(wandb=settings)]


def _file(source: Any) -> str | None:
    """The id of the uploaded file of a dataset, or the kind and name of another source, such as ``hub:org/name``."""
    first: Any = source[0] if isinstance(source, list) and source else source
    if not isinstance(first, dict):
        return None
    file: Any = first.get("file")
    if file is not None:
        return str(file[0] if isinstance(file, list) else file)
    return next((f"{kind}:{first[kind]}" for kind in ("path", "hub", "builtin") if kind in first), None)


def _seconds(time: datetime) -> int:
    return int(time.timestamp())
