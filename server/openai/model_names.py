"""The names of models: base models under names that users have chosen, and the checkpoints of jobs.

A base model is named by `zeta models add` in a project, or by ``ZETA_OPENAI_MODELS`` in all of them. A checkpoint is
named ``ft:<base>:<project>:<suffix>:<id>``, with ``:ckpt-step-N`` for one before the end, or by its job: ``job_...`` or
``job_.../step-N``, ``best`` or ``final``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.checkpoints import checkpoints_newest_first
from server.database.tables import CheckpointRow, JobRow, ModelNameRow
from server.jobs.queries import find_training
from server.service import Service
from zeta_core.contract.errors import NotFound
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT, NAME_PATTERN
from zeta_core.contract.spec.sources import MODEL_SOURCE, ModelSource
from zeta_core.contract.spec.validation import shown

ANY_DATASET = {"builtin": "python-docs"}  # completes a spec, so that its other fields can be checked
_FINE_TUNED = re.compile(r"ft:.+:([0-9a-z]+?)(?::ckpt-([a-z0-9-]+))?\Z")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class BaseModelName:
    """A base model: its name, its source, and the fields of a spec that its jobs start from."""

    name: str
    source: ModelSource
    defaults: dict[str, Any]


@dataclass(frozen=True)
class CheckpointName:
    """A stored checkpoint of a job; ``checkpoint`` is ``step-N``, ``best`` or ``final``."""

    job: JobRow
    checkpoint: str


async def resolve_model(
    session: AsyncSession, service: Service, caller: Caller, name: str
) -> BaseModelName | CheckpointName:
    """The model with this name.

    A job's name without a checkpoint stands for ``final``, or for the newest checkpoint until the job has succeeded.
    Raises `NotFound`, which lists the existing base models and the command that names one.
    """
    base_models = await base_models_by_name(session, service, caller)
    if name in base_models:
        return base_models[name]
    if name.startswith("ft:"):
        found = await _fine_tuned(session, caller, name)
    elif name.startswith("job_"):
        job_id, _, checkpoint = name.partition("/")
        found = await _checkpoint(session, caller, job_id, checkpoint or None)
    else:
        found = None
    if found is None:
        raise unknown_model(name, sorted(base_models))
    return found


async def base_models_by_name(session: AsyncSession, service: Service, caller: Caller) -> dict[str, BaseModelName]:
    """The base models that the caller may use, by name."""
    models = {name: BaseModelName(name, source, {}) for name, source in service.settings.openai_base_models.items()}
    rows = await session.scalars(select(ModelNameRow).where(ModelNameRow.project == caller.project))
    for row in rows:
        defaults = {name: value for name, value in row.spec.items() if name != "model"}
        models[row.name] = BaseModelName(row.name, MODEL_SOURCE.validate_python(row.spec["model"]), defaults)
    return models


def unknown_model(name: str, existing: list[str]) -> NotFound:
    listed = f"the existing base models are {', '.join(existing)}" if existing else "no base model has a name yet"
    return NotFound(
        f"The model {shown(name)} does not exist; {listed}. Give a base model this name with "
        "`zeta models add NAME SOURCE`, or with ZETA_OPENAI_MODELS on the server.",
        code="model_not_found",
        param="model",
    )


def fine_tuned_model(job: JobRow, checkpoint: str = FINAL_CHECKPOINT) -> str:
    """The name of a job's checkpoint in OpenAI's format."""
    suffix = _UNSAFE.sub("-", job.entity_name or "")
    project = _UNSAFE.sub("-", job.project)
    name = f"ft:{base_model_of(job)}:{project}:{suffix}:{job.id.removeprefix('job_')}"
    return name if checkpoint == FINAL_CHECKPOINT else f"{name}:ckpt-{checkpoint}"


def base_model_of(job: JobRow) -> str:
    """The name of the model that the job started from, as requested, or from its spec."""
    if job.openai_request is not None:
        return str(job.openai_request.get("model"))
    model: Any = job.spec.get("model")
    if isinstance(model, str):
        return model
    if not isinstance(model, dict):
        return "unknown"
    if "config" in model:
        return str(model["config"].get("model_type", "config"))
    return str(model.get("job") or model.get("file") or model.get("builder") or "unknown")


async def _fine_tuned(session: AsyncSession, caller: Caller, name: str) -> CheckpointName | None:
    match = _FINE_TUNED.match(name)
    if match is None or not is_id(f"job_{match.group(1)}", "job"):
        return None
    found = await _checkpoint(session, caller, f"job_{match.group(1)}", match.group(2) or FINAL_CHECKPOINT)
    if found is None or fine_tuned_model(found.job, found.checkpoint) != name:
        return None
    return found


async def _checkpoint(
    session: AsyncSession, caller: Caller, job_id: str, checkpoint: str | None
) -> CheckpointName | None:
    try:
        job = await find_training(session, caller, job_id)
    except NotFound:
        return None
    if checkpoint is None:
        final = await session.get(CheckpointRow, (job_id, FINAL_CHECKPOINT))
        checkpoint = FINAL_CHECKPOINT if final else await session.scalar(checkpoints_newest_first(job_id).limit(1))
        if checkpoint is None:
            raise NotFound(
                f"Job {job_id} is {job.status} and has no checkpoint yet; wait for its first one.",
                code="checkpoint_not_found",
                param="model",
            )
        return CheckpointName(job, checkpoint)
    if not NAME_PATTERN.match(checkpoint) or await session.get(CheckpointRow, (job_id, checkpoint)) is None:
        return None
    return CheckpointName(job, checkpoint)
