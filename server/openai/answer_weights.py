"""The weights that a model's name stands for, and whether the caller may use them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from typing import Any

from pydantic import JsonValue

from server.auth import Caller
from server.database.checkpoints import checkpoints_newest_first
from server.database.model_bases import names_of_bases
from server.database.tables import JobRow
from server.jobs.queries import find_training
from server.openai.model_names import ANY_DATASET, BaseModelName, resolve_model
from server.openai.shared_bases import shared_base
from server.service import Service
from server.submitting.references import check_references
from zeta_core.contract.errors import InvalidRequest, NotFound, Unavailable
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.options import Quantization
from zeta_core.contract.spec.sources import MODEL_SOURCE
from zeta_core.contract.spec.validation import parse
from zeta_core.contract.wire.answers import ServedWeights

logger = logging.getLogger(__name__)

BASE = "base"  # in "job_.../base": the model that the job started from


async def find_weights(service: Service, caller: Caller, name: str) -> ServedWeights:
    """The weights of a checkpoint, of a named base model, or of a job's base (``job_.../base``).

    Raises `NotFound`, also for the jobs of other projects, and `InvalidRequest` for a model that can't answer.
    """
    weights = await _find_weights(service, caller, name)
    async with service.database.read() as session:
        bases = await names_of_bases(session, weights.project, weights.model)
    return weights.model_copy(update={"bases": bases})


async def _find_weights(service: Service, caller: Caller, name: str) -> ServedWeights:
    job_id, _, rest = name.partition("/")
    if rest == BASE and is_id(job_id, "job"):
        return await _base_of_job(service, caller, job_id)
    async with service.database.read() as session:
        found = await resolve_model(session, service, caller, name)
    if isinstance(found, BaseModelName):
        return await _named_base(service, caller, found)
    job, checkpoint = found.job, found.checkpoint
    stored = await asyncio.to_thread(service.artifacts.checkpoint, job.id, checkpoint)
    if stored is None:
        raise NotFound(
            f"Checkpoint {checkpoint} of {job.id} was removed in the meantime; send the request again.",
            code="checkpoint_not_found",
            param="model",
        )
    if stored.manifest.format == "module":
        raise InvalidRequest(
            f"{job.id}/{checkpoint} contains the weights of a custom module, which can't generate text.",
            code="cannot_answer",
            param="model",
        )
    quantize = _quantize(job) if stored.manifest.format == "adapter" else None
    return ServedWeights(
        name=f"{job.id}/{checkpoint}",
        project=job.project,
        model={"job": job.id, "checkpoint": checkpoint},
        fingerprint=hashlib.sha256(stored.manifest_bytes).hexdigest(),
        has_manifest=True,
        quantize=quantize,
        base=await asyncio.to_thread(shared_base, service.artifacts, stored, quantize),
        files=job.resolved_spec.files,
        hub=caller.limits.hub_access,
    )


async def _named_base(service: Service, caller: Caller, base: BaseModelName) -> ServedWeights:
    """A named base model, which must be one that a job of the caller may start from."""
    source = MODEL_SOURCE.dump_python(base.source, mode="json")
    spec = parse(JobSpec, {"model": source, "dataset": ANY_DATASET})
    async with service.database.write() as session:  # the check locks the rows that it reads
        files = await check_references(session, service, caller, spec)
    weights = _base_weights(base.name, caller.project, source)
    return weights.model_copy(update={"files": files, "hub": caller.limits.hub_access})


async def _base_of_job(service: Service, caller: Caller, job_id: str) -> ServedWeights:
    """The base of a job. Its run has reported it, so it may name only what a job of the caller may start from."""
    async with service.database.read() as session:
        job = await find_training(session, caller, job_id)
        newest = await session.scalar(checkpoints_newest_first(job_id).limit(1))
    model = job.resolved_spec.model or job.spec.get("model")
    if isinstance(model, dict) and ("config" in model or "builder" in model):
        raise InvalidRequest(
            f"Job {job.id} was trained from scratch, so it has no base model that could answer.",
            code="cannot_answer",
            param="model",
        )
    spec = parse(JobSpec, {"model": model, "dataset": ANY_DATASET})
    async with service.database.write() as session:  # the check locks the rows that it reads
        files = await check_references(session, service, caller, spec)
    weights = _base_weights(f"{job.id}/{BASE}", job.project, model)
    quantize = _quantize(job)  # a base that was trained in 4 bits may not fit into the memory otherwise
    return weights.model_copy(
        update={
            "files": files,
            "hub": caller.limits.hub_access,
            "quantize": quantize,
            "base_of_adapters": None if newest is None else await _shared_base(service, job, newest, quantize),
        }
    )


async def _shared_base(service: Service, job: JobRow, checkpoint: str, quantize: str | None) -> str | None:
    """The hash of the base that the adapter in this checkpoint of the job can share; see `shared_base`.

    If the checkpoint can't be read, the base is loaded without sharing it.
    """
    try:
        stored = await asyncio.to_thread(service.artifacts.checkpoint, job.id, checkpoint)
        return None if stored is None else await asyncio.to_thread(shared_base, service.artifacts, stored, quantize)
    except Unavailable as error:
        logger.warning("The base of %s can't be shared: %s", job.id, error.message, extra={"action": "answer"})
        return None


def _base_weights(name: str, project: str, model: JsonValue) -> ServedWeights:
    if isinstance(model, dict) and "config" in model:
        raise InvalidRequest(
            f"{name} is an architecture without weights, so it can't answer; train it, and use the id of the job.",
            code="cannot_answer",
            param="model",
        )
    fingerprint = hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()
    return ServedWeights(name=name, project=project, model=model, fingerprint=fingerprint)


def _quantize(job: JobRow) -> Quantization | None:
    lora: Any = job.spec.get("lora")
    return lora.get("quantize") if isinstance(lora, dict) else None
