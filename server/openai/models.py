"""Models as the `openai` client lists them: the named base models, and the final checkpoints of jobs."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select

from server.auth import Caller
from server.database.tables import CheckpointRow, JobRow
from server.jobs import deletions
from server.openai.model_names import (
    BaseModelName,
    CheckpointName,
    base_models_by_name,
    fine_tuned_model,
    resolve_model,
)
from server.service import Service
from zeta_core.contract.errors import InvalidRequest, PermissionDenied
from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT
from zeta_core.contract.job.kind import JobKind

OWNER = "zeta"  # of the base models
MAX_MODELS = 1000  # the list has no pages


class OpenAIModel(BaseModel):
    """A model. ``created`` is a Unix time in seconds, and 0 for a base model from the settings."""

    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class OpenAIModelList(BaseModel):
    model_config = ConfigDict(frozen=True)

    object: Literal["list"] = "list"
    data: list[OpenAIModel]


class DeletedModel(BaseModel):
    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


async def list_models(service: Service, caller: Caller) -> OpenAIModelList:
    """The base models by name, then the newest fine-tuned models, `MAX_MODELS` in all."""
    final = select(CheckpointRow.job_id).where(CheckpointRow.name == FINAL_CHECKPOINT)
    is_own_training = (JobRow.project == caller.project, JobRow.kind == JobKind.TRAINING)
    query = select(JobRow).where(*is_own_training, JobRow.deleted_at.is_(None), JobRow.id.in_(final))
    async with service.database.read() as session:
        base_models = await base_models_by_name(session, service, caller)
        models = [_base_model(base_models[name]) for name in sorted(base_models)]
        newest = query.order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(max(0, MAX_MODELS - len(models)))
        models += [_fine_tuned(CheckpointName(job, FINAL_CHECKPOINT)) for job in await session.scalars(newest)]
    return OpenAIModelList(data=models)


async def get_model(service: Service, caller: Caller, name: str) -> OpenAIModel:
    """The model with this name; its ``id`` is the canonical one. Raises `NotFound`."""
    async with service.database.read() as session:
        found = await resolve_model(session, service, caller, name)
    return _base_model(found) if isinstance(found, BaseModelName) else _fine_tuned(found)


async def delete_model(service: Service, caller: Caller, name: str) -> DeletedModel:
    """Delete a fine-tuned model with its job.

    Raises `NotFound`, `PermissionDenied` for a base model, `InvalidRequest` for a checkpoint that is not final, and
    `Conflict` if the job hasn't ended or another job needs it.
    """
    async with service.database.read() as session:
        found = await resolve_model(session, service, caller, name)
    if isinstance(found, BaseModelName):
        raise PermissionDenied(
            f"{name!r} is the name of a base model, which this request can't delete; remove the name with "
            "`zeta models remove`, or from ZETA_OPENAI_MODELS on the server.",
            code="base_model",
            param="model",
        )
    if found.checkpoint != FINAL_CHECKPOINT:
        raise InvalidRequest(
            f"{name!r} is a checkpoint of {found.job.id}; delete the whole fine-tuned model, "
            f"{fine_tuned_model(found.job)!r}.",
            code="checkpoint_of_model",
            param="model",
        )
    await deletions.delete(service, caller, found.job.id)
    return DeletedModel(id=fine_tuned_model(found.job))


def _base_model(model: BaseModelName) -> OpenAIModel:
    return OpenAIModel(id=model.name, created=0, owned_by=OWNER)


def _fine_tuned(model: CheckpointName) -> OpenAIModel:
    name = fine_tuned_model(model.job, model.checkpoint)
    finished: datetime = model.job.finished_at or model.job.created_at
    return OpenAIModel(id=name, created=int(finished.timestamp()), owned_by=model.job.project)
