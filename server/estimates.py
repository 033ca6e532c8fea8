"""Validation: the checks of a submission without a job, and what the server alone can say of it.

The server knows the spec, given configs and the jobs that ran here; it loads no model and reads no data. What only a
worker could find out is null, with the reason in ``pending``.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.tables import JobRow
from server.parameters import count_parameters
from server.references import check_first_rows, check_references, check_training_state, with_named_checkpoint
from server.resuming import check_exact_resume
from server.service import Service
from zeta_core.contract.defaults import resolve
from zeta_core.contract.estimate import Bytes, Estimate
from zeta_core.contract.spec import ConfigModel, JobModel, JobSpec
from zeta_core.contract.validation import parse

# Weights, their gradients and AdamW's two moments, each a float32 (https://arxiv.org/abs/1910.02054, section 3.1).
ADAMW_BYTES_PER_PARAMETER = 16
_LEAST_MEMORY = "at least: weights, gradients and the optimizer's state; activations come on top"
_MODEL_UNREAD = "The model is read when the job starts; its files were not opened to answer this."
_CONFIG_OPEN = "The config leaves numbers to the defaults of its model_type, or is of a type that only a worker knows."
_DATA_UNREAD = "The data is counted when the job starts; with max_steps the number of steps is known before."
_NOT_MEASURED = "It depends on the device and is measured by the first steps; see the job's progress."


async def validate(service: Service, caller: Caller, data: Any) -> Estimate:
    """What a submission of ``data`` would be. Raises what the submission would raise."""
    spec = parse(JobSpec, data)
    await check_training_state(service, caller, spec)
    await check_first_rows(service, caller, spec)
    async with service.database.read() as session:
        files = await check_references(session, service.settings, caller.project, spec)
        spec = await with_named_checkpoint(session, spec)
        await check_exact_resume(session, spec)
        parameters, unknown = await _parameters(session, spec)
    resolved = {**resolve(spec), "files": files}
    return _estimate(spec, resolved, parameters, unknown)


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
    pending: dict[str, str] = {"disk": _MODEL_UNREAD if parameters is None else _NOT_MEASURED, "time": _NOT_MEASURED}
    if parameters is None:
        pending["parameters"] = unknown
    trainable = parameters if spec.lora is None and not resolved.get("freeze") else None
    if trainable is None:
        pending["trainable_parameters"] = unknown if parameters is None else "A worker knows which weights are trained."
    if spec.max_steps is None:
        pending["steps"] = _DATA_UNREAD
    tokens: int | None = None
    if spec.max_steps is None or resolved["seq_len"] is None:
        pending["tokens"] = _DATA_UNREAD if spec.max_steps is None else _MODEL_UNREAD
    else:
        tokens = spec.max_steps * int(resolved["global_batch_size"]) * int(resolved["seq_len"])
    memory: Bytes | None = None
    if trainable is None:
        pending["memory"] = pending["trainable_parameters"]
    elif spec.optimizer != "adamw" or spec.use_fsdp or spec.use_deepspeed:
        pending["memory"] = _NOT_MEASURED
    else:
        memory = Bytes(bytes=ADAMW_BYTES_PER_PARAMETER * trainable, meaning=_LEAST_MEMORY)
    return Estimate(
        resolved_spec=resolved,
        parameters=parameters,
        trainable_parameters=trainable,
        steps=spec.max_steps,
        tokens=tokens,
        memory=memory,
        pending=pending,
    )
