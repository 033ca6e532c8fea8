"""Validation: the checks of a submission without a job, and what follows from the spec.

A worker is asked for what needs torch and transformers (`engine.checks`). Where none answers, the server says what it
knows alone: the spec, given configs, and the jobs that ran here. What is null then has its reason in ``pending``.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.tables import JobRow
from server.estimates.earlier_jobs import find_earlier
from server.estimates.parameter_counts import count_parameters
from server.estimates.sequence_counts import find_counted, global_batch_of, is_fixed, steps_of
from server.service import Service
from server.submitting.acceptance import accept, read_spec
from zeta_core.contract.job.check import CheckAnswer
from zeta_core.contract.job.estimate import Bytes, Estimate, Memory
from zeta_core.contract.job.memory import FLOAT32_BYTES, FSDP_STAGE, least_state_bytes, memory_parts
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.rate_search import FOUND_AT_THE_START
from zeta_core.contract.spec.sources import ConfigModel, JobModel, dataset_sources
from zeta_core.contract.spec.validation import error_of

_LEAST_MEMORY = (
    "of one process, at least: weights, gradients and the optimizer's state; activations, temporary buffers and memory "
    "held by libraries are not included"
)
_DEEPSPEED = "DeepSpeed places its memory and chooses its precisions itself, which only a worker can estimate."
_MODEL_UNREAD = "The model is read when the job starts; its files were not opened to answer this."
_CONFIG_OPEN = "The config leaves numbers to the defaults of its model_type, or is of a type that only a worker knows."
_DATA_UNREAD = (
    "Unknown until the data is counted when the job starts; no earlier job of this project has counted the same data. "
    "With max_steps, the number of steps is known."
)
_ASK_A_WORKER = "Only a worker can determine it."
_OF_A_WORKER = ("data", "vocabulary", "isolates")  # fields that only a worker can determine
_MEMORY = (
    "of one process: weights, gradients, the optimizer's state and the activations kept for the backward pass; "
    "temporary buffers and memory held by libraries are not included"
)
_OUR_NAME = {
    "num_parameters": "parameters",
    "num_trained_parameters": "trainable_parameters",
    "total_steps": "steps",
    "checkpoint_bytes": "disk",
    "memory.activations": "memory",
}
_NOT_MEASURED = "It depends on the device and is measured by the first steps; see the job's progress."
_RESUMED = "How much is left of a run that is resumed is known when its checkpoint is read."


async def validate(service: Service, caller: Caller, data: Any) -> Estimate:
    """What a submission of ``data`` would be. Raises what the submission would raise."""
    spec = await read_spec(service, caller, data)
    async with service.database.read() as session:
        accepted = await accept(session, service, caller, spec)
        parameters, unknown = await _parameters(session, accepted.spec)
    spec, resolved = accepted.spec, accepted.resolved_spec
    alone = _estimate(spec, resolved, parameters, unknown)
    sent = {**data, "model": resolved["model"]} if isinstance(spec.model, JobModel) else data
    sources = [*dataset_sources(spec.dataset), *dataset_sources(spec.eval_dataset)]
    reuse = all(is_fixed(source) for source in sources)
    found = await service.engine.spec_checks.request(sent, resolved, spec.resources.num_processes, reuse=reuse)
    if isinstance(found, str):
        pending = {**alone.pending, **dict.fromkeys(_OF_A_WORKER, _ASK_A_WORKER)}
        known = alone.model_copy(update={"pending": {name: f"{why} {found}" for name, why in pending.items()}})
    elif found.ok:
        known = _with(alone, found, spec)
    else:
        raise error_of(list(found.details))
    return await _with_earlier_job(service, caller, spec, known)


async def _with_earlier_job(service: Service, caller: Caller, spec: JobSpec, known: Estimate) -> Estimate:
    """What is known, and what earlier jobs tell: the data's length, the time of its steps, the memory held."""
    resolved, time, memory = known.resolved_spec, None, known.memory
    async with service.database.read() as session:
        counted = None if _is_length_known(known) else await find_counted(session, caller.project, spec, resolved)
        if counted is not None:
            known = _with_count(known, spec, *counted)
            resolved = known.resolved_spec
        earlier = await find_earlier(session, service.engine, caller.project, spec, resolved)
    if not _is_length_known(known):
        why = _DATA_UNREAD
    elif spec.resume_from_checkpoint is not None:
        why = _RESUMED
    elif isinstance(earlier, str):
        why = earlier
    else:
        job, device = earlier
        why, time = None, job.time_of((known.steps or 0) * int(resolved["global_batch_size"]), device)
    if memory is not None and not isinstance(earlier, str):
        memory = memory.model_copy(update={"measured": earlier[0].measured_memory})
    pending = {name: reason for name, reason in known.pending.items() if name != "time"}
    pending |= {} if why is None else {"time": why}
    return known.model_copy(update={"time": time, "memory": memory, "pending": pending})


def _is_length_known(known: Estimate) -> bool:
    return known.steps is not None and known.resolved_spec["global_batch_size"] is not None


def _with_count(known: Estimate, spec: JobSpec, job_id: str, num_sequences: int) -> Estimate:
    """The estimate with the global batch, steps and tokens that follow from an earlier job's number of sequences."""
    resolved = known.resolved_spec
    resolved = {**resolved, "global_batch_size": resolved["global_batch_size"] or global_batch_of(num_sequences, spec)}
    if spec.max_steps is None:
        steps, sequences = steps_of(num_sequences, resolved)
    else:
        steps, sequences = spec.max_steps, spec.max_steps * resolved["global_batch_size"]
    found: dict[str, Any] = {"steps": steps, "tokens": sequences * int(resolved["seq_len"])}
    pending = {name: why for name, why in known.pending.items() if name not in found}
    return known.model_copy(update={**found, "resolved_spec": resolved, "counted_by": job_id, "pending": pending})


def _with(alone: Estimate, found: CheckAnswer, spec: JobSpec) -> Estimate:
    """What the server knows, and on top of it what a worker found out."""
    values: dict[str, Any] = {
        "parameters": found.num_parameters,
        "trainable_parameters": found.num_trained_parameters,
        "steps": found.total_steps,
        "tokens": found.tokens,
        "data": found.data,
        "vocabulary": found.vocabulary,
        "isolates": found.isolates,
    }
    if found.memory is not None and found.memory.total is not None:
        parts = found.memory.model_dump(exclude={"total"})
        values["memory"] = Memory.model_validate({"bytes": found.memory.total, "meaning": _MEMORY, **parts})
    if found.checkpoint_bytes is not None:
        most = spec.save_total_limit + 1
        meaning = f"at most {most} checkpoints of {found.checkpoint_bytes} bytes with their training state"
        values["disk"] = Bytes(bytes=found.checkpoint_bytes * most, meaning=meaning)
    known = {name: value for name, value in values.items() if value is not None}
    told = {_OUR_NAME.get(name, name): why for name, why in found.pending.items()}
    pending = {name: why for name, why in {**alone.pending, **told}.items() if name not in known}
    resolved = {**(found.resolved_spec or {}), "files": alone.resolved_spec["files"]}
    update = {**known, "pending": pending, "resolved_spec": {**alone.resolved_spec, **resolved}}
    for name in _OF_A_WORKER:
        if name not in known:
            pending.setdefault(name, _ASK_A_WORKER)
    return alone.model_copy(update=update)


async def _parameters(session: AsyncSession, spec: JobSpec) -> tuple[int | None, str]:
    """The model's parameters, or why they are not known."""
    if isinstance(spec.model, ConfigModel):
        return count_parameters(spec.model.config), _CONFIG_OPEN
    if isinstance(spec.model, JobModel):
        job = await session.get(JobRow, spec.model.job)
        counted = job.resolved_spec.get("num_parameters") if job is not None and not job.spec.get("lora") else None
        return counted if isinstance(counted, int) else None, _MODEL_UNREAD
    return None, _MODEL_UNREAD


def _estimate(spec: JobSpec, resolved: dict[str, Any], parameters: int | None, unknown: str) -> Estimate:
    pending: dict[str, str] = {"disk": _MODEL_UNREAD if parameters is None else _NOT_MEASURED}
    if parameters is None:
        pending["parameters"] = unknown
    trainable = parameters if spec.lora is None and not resolved.get("freeze") else None
    if trainable is None:
        pending["trainable_parameters"] = unknown if parameters is None else "A worker knows which weights are trained."
    if spec.max_steps is None:
        pending["steps"] = _DATA_UNREAD
    if resolved["learning_rate"] is None:
        pending["learning_rate"] = FOUND_AT_THE_START
    tokens: int | None = None
    if spec.max_steps is None or resolved["global_batch_size"] is None:
        pending["tokens"] = _DATA_UNREAD
    elif resolved["seq_len"] is None:
        pending["tokens"] = _MODEL_UNREAD
    else:
        tokens = spec.max_steps * int(resolved["global_batch_size"]) * int(resolved["seq_len"])
    memory: Memory | None = None
    if parameters is None or trainable is None:
        pending["memory"] = pending["trainable_parameters"]
    elif spec.use_deepspeed:
        pending["memory"] = _DEEPSPEED
    else:
        memory = _least_memory(spec, parameters, trainable)
    return Estimate(
        resolved_spec=resolved,
        parameters=parameters,
        trainable_parameters=trainable,
        steps=spec.max_steps,
        tokens=tokens,
        memory=memory,
        pending=pending,
    )


def _least_memory(spec: JobSpec, parameters: int, trainable: int) -> Memory:
    parts = memory_parts(
        weights=FLOAT32_BYTES * parameters,
        num_trained=trainable,
        optimizer=least_state_bytes(spec.optimizer, trainable),
        stage=FSDP_STAGE if spec.use_fsdp else 0,
        num_processes=spec.resources.num_processes,
    )
    total = parts.weights + parts.gradients + parts.optimizer
    return Memory(bytes=total, meaning=_LEAST_MEMORY, **parts.model_dump())
