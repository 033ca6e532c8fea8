"""``POST /v1/jobs/validate``: validates a spec like a submission, without creating a job, and estimates its cost.

A worker determines everything that needs torch and transformers (`engine.spec_checks`). Without one, the server reports
only what follows from the spec, its configs, and earlier jobs. ``pending`` has the reason for each field that is null.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.tables import JobRow
from server.estimates.earlier_jobs import find_earlier_job, resolve_gpus
from server.estimates.parameter_counts import count_parameters
from server.estimates.sequence_counts import count_steps, default_global_batch, find_sequence_count, has_fixed_content
from server.service import Service
from server.submitting.acceptance import accept, read_spec
from zeta_core.contract.job.check import CheckAnswer
from zeta_core.contract.job.estimate import Bytes, Estimate, Memory
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.range_test import RATE_UNKNOWN
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.spec.sources import ConfigModel, JobModel, dataset_sources
from zeta_core.contract.spec.validation import error_from_details

_MODEL_UNREAD = "Unknown until the model is loaded when the job starts."
_CONFIG_INCOMPLETE = (
    "Unknown, because the config relies on defaults of its model_type, or only a worker knows that type."
)
_TRAINED_UNKNOWN = "Only a worker can determine which weights are trained."
_DATA_UNREAD = (
    "Unknown until the data is counted when the job starts; no earlier job of this project has counted the same data. "
    "With max_steps, the number of steps is known."
)
_RESUMED = "Unknown until the checkpoint is read, which determines the number of steps that are left."
_NEEDS_WORKER = "Only a worker can determine it."
_WORKER_FIELDS: tuple[str, ...] = ("memory", "disk", "data", "vocabulary", "isolates")
_MEMORY = (
    "of one process: weights, gradients, the optimizer's state and the activations kept for the backward pass; "
    "temporary buffers and memory held by libraries are not included"
)
# The fields of an estimate by the names that a worker's answer uses.
_ESTIMATE_NAMES = {
    "num_parameters": "parameters",
    "num_trained_parameters": "trainable_parameters",
    "total_steps": "steps",
    "checkpoint_bytes": "disk",
    "memory.activations": "memory",
}


@dataclass(frozen=True)
class _ParameterCount:
    """The model's parameters, or the reason why their number is unknown."""

    parameters: int | None
    reason: str


async def validate(service: Service, caller: Caller, body: Any) -> Estimate:
    """Check a body as a submission would, and estimate its job. Raises the errors of a submission."""
    spec = await read_spec(service, caller, body)
    async with service.database.read() as session:
        accepted = await accept(session, service, caller, spec)
        assert isinstance(accepted.spec, JobSpec), "only the spec of a training has an estimate"
        count = await _count_parameters(session, accepted.spec)
    resources = resolve_gpus(service.engine, accepted.spec.resources)
    spec, resolved = accepted.spec.model_copy(update={"resources": resources}), accepted.resolved_spec
    estimate = _without_worker(spec, resolved, count)
    request = {**body, "model": resolved.model} if isinstance(spec.model, JobModel) else body
    sources = [*dataset_sources(spec.dataset), *dataset_sources(spec.eval_dataset)]
    reuse = all(has_fixed_content(source) for source in sources)
    answer = await service.engine.spec_checks.request(
        caller.project,
        request,
        resolved,
        resources.num_processes or 1,
        hub=caller.limits.hub_access,
        reuse=reuse,
    )
    if isinstance(answer, str):
        pending = {name: f"{reason} {answer}" for name, reason in estimate.pending.items()}
        estimate = estimate.model_copy(update={"pending": pending})
    elif answer.ok:
        estimate = _with_answer(estimate, answer, spec)
    else:
        raise error_from_details(list(answer.details))
    return await _with_earlier_jobs(service, caller, spec, estimate)


async def _with_earlier_jobs(service: Service, caller: Caller, spec: JobSpec, estimate: Estimate) -> Estimate:
    """Add what earlier jobs measured: the amount of the data, the time of a step, and the memory."""
    time, memory = None, estimate.memory
    async with service.database.read() as session:
        if not _is_length_known(estimate):
            counted = await find_sequence_count(session, caller.project, spec, estimate.resolved_spec)
            if counted is not None:
                estimate = _with_count(estimate, spec, *counted)
        earlier = await find_earlier_job(session, service.engine, caller.project, spec, estimate.resolved_spec)
    if not _is_length_known(estimate):
        reason = _DATA_UNREAD
    elif spec.resume_from_checkpoint is not None:
        reason = _RESUMED
    elif isinstance(earlier, str):
        reason = earlier
    else:
        job, device = earlier
        num_sequences = (estimate.steps or 0) * (estimate.resolved_spec.global_batch_size or 0)
        reason, time = None, job.training_time(num_sequences, device)
    if memory is not None and not isinstance(earlier, str):
        memory = memory.model_copy(update={"measured": earlier[0].measured_memory})
    pending = {name: other for name, other in estimate.pending.items() if name != "time"}
    pending |= {} if reason is None else {"time": reason}
    return estimate.model_copy(update={"time": time, "memory": memory, "pending": pending})


def _is_length_known(estimate: Estimate) -> bool:
    return estimate.steps is not None and estimate.resolved_spec.global_batch_size is not None


def _with_count(estimate: Estimate, spec: JobSpec, job_id: str, num_sequences: int) -> Estimate:
    """Add the global batch, steps and tokens that follow from an earlier job's number of sequences."""
    resolved = estimate.resolved_spec
    global_batch_size = resolved.global_batch_size or default_global_batch(num_sequences, spec)
    if spec.max_steps is not None:
        steps, sequences = spec.max_steps, spec.max_steps * global_batch_size
    else:
        assert resolved.epochs is not None, "epochs or max_steps is set"
        steps, sequences = count_steps(num_sequences, resolved.epochs, global_batch_size)
    assert resolved.seq_len is not None, "find_sequence_count compares it"
    update: dict[str, Any] = {
        "steps": steps,
        "tokens": sequences * resolved.seq_len,
        "resolved_spec": resolved.updated(ResolvedSpec(global_batch_size=global_batch_size)),
        "counted_by": job_id,
        "pending": {name: why for name, why in estimate.pending.items() if name not in ("steps", "tokens")},
    }
    return estimate.model_copy(update=update)


def _with_answer(estimate: Estimate, answer: CheckAnswer, spec: JobSpec) -> Estimate:
    """Add a worker's answer, which takes precedence."""
    values: dict[str, Any] = {
        "parameters": answer.num_parameters,
        "trainable_parameters": answer.num_trained_parameters,
        "steps": answer.total_steps,
        "tokens": answer.tokens,
        "data": answer.data,
        "vocabulary": answer.vocabulary,
        "isolates": answer.isolates,
    }
    if answer.memory is not None and answer.memory.total is not None:
        parts = answer.memory.model_dump(exclude={"total"})
        values["memory"] = Memory.model_validate({"bytes": answer.memory.total, "meaning": _MEMORY, **parts})
    if answer.checkpoint_bytes is not None:
        most = spec.save_total_limit + 1
        meaning = f"at most {most} checkpoints of {answer.checkpoint_bytes} bytes with their training state"
        values["disk"] = Bytes(bytes=answer.checkpoint_bytes * most, meaning=meaning)
    reported = {name: value for name, value in values.items() if value is not None}
    reasons = estimate.pending | {_ESTIMATE_NAMES.get(name, name): why for name, why in answer.pending.items()}
    pending = {name: why for name, why in reasons.items() if name not in reported}
    resolved = estimate.resolved_spec
    if answer.resolved_spec is not None:
        resolved = resolved.updated(answer.resolved_spec).updated(ResolvedSpec(files=resolved.files))
    return estimate.model_copy(update={**reported, "pending": pending, "resolved_spec": resolved})


async def _count_parameters(session: AsyncSession, spec: JobSpec) -> _ParameterCount:
    if isinstance(spec.model, ConfigModel):
        return _ParameterCount(count_parameters(spec.model.config), _CONFIG_INCOMPLETE)
    if isinstance(spec.model, JobModel):
        job = await session.get(JobRow, spec.model.job)
        counted = job.resolved_spec.num_parameters if job is not None and not job.spec.get("lora") else None
        return _ParameterCount(counted, _MODEL_UNREAD)
    return _ParameterCount(None, _MODEL_UNREAD)


def _without_worker(spec: JobSpec, resolved: ResolvedSpec, count: _ParameterCount) -> Estimate:
    """The estimate that follows from the spec alone."""
    pending: dict[str, str] = dict.fromkeys(_WORKER_FIELDS, _NEEDS_WORKER)
    if count.parameters is None:
        pending["parameters"] = count.reason
    trainable = count.parameters if spec.lora is None and not spec.freeze else None
    if trainable is None:
        pending["trainable_parameters"] = count.reason if count.parameters is None else _TRAINED_UNKNOWN
    if spec.max_steps is None:
        pending["steps"] = _DATA_UNREAD
    if resolved.learning_rate is None:
        pending["learning_rate"] = RATE_UNKNOWN
    tokens: int | None = None
    if spec.max_steps is None or resolved.global_batch_size is None:
        pending["tokens"] = _DATA_UNREAD
    elif resolved.seq_len is None:
        pending["tokens"] = _MODEL_UNREAD
    else:
        tokens = spec.max_steps * resolved.global_batch_size * resolved.seq_len
    return Estimate(
        resolved_spec=resolved,
        parameters=count.parameters,
        trainable_parameters=trainable,
        steps=spec.max_steps,
        tokens=tokens,
        pending=pending,
    )
