"""Checks which fields a job that resumes another job's checkpoint may change, so that it continues exactly.

The run repeats this check when it knows the data's tokens and the model's limits. Rejecting a spec here saves the
minutes until then. Omitted fields keep their values from the resumed run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import AttemptRow, CheckpointRow, JobRow
from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.spec.affects import options_affecting
from zeta_core.contract.spec.deepspeed import requested_zero_stage
from zeta_core.contract.spec.defaults import resolve
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.spec.validation import error_from_details, shown

# A worker rejects a change of these, too (`zeta_core.plan.FIXED_PLAN_FIELDS`). All other fields may change.
FIXED_ON_RESUME = options_affecting(JobSpec, "results")
# These are compared even if they are omitted, because their defaults can differ from the resumed run.
_ALWAYS_COMPARED = frozenset({"tokenizer", "use_pretokenized", "use_fsdp", "use_deepspeed", "lora", "method"})


async def check_exact_resume(session: AsyncSession, spec: JobSpec) -> None:
    """Raise `InvalidSpec` with every field that differs from the resumed run but must not change.

    `references.check_references` has verified that the checkpoint exists.
    """
    job_id, _, name = (spec.resume_from_checkpoint or "").partition("/")
    resumed = await session.get(JobRow, job_id) if job_id else None
    if resumed is None:
        return
    weights = f'"model": {{"job": "{job_id}", "checkpoint": "{name or "latest"}"}}'
    details = [
        ErrorDetail(
            param=param,
            message=f"{param} is {shown(now)}, but {job_id} was started with {shown(then)}, and a resumed run must "
            f'continue exactly; keep the value, rerun with "from": "start", or start from the weights: {weights} '
            "without resume_from_checkpoint.",
            code="changed_on_resume",
        )
        for param, now, then in _changed_fields(spec, resumed)
    ]
    if details:
        raise error_from_details(details)


async def find_device_kind(session: AsyncSession, resumed: str) -> str | None:
    """The kind of device that computed a checkpoint, ``job_...`` or ``job_.../step-N``; the next attempt prefers it."""
    job_id, _, name = resumed.partition("/")
    checkpoint = await session.get(CheckpointRow, (job_id, name)) if name else None
    attempt = None if checkpoint is None else await session.get(AttemptRow, (job_id, checkpoint.attempt))
    if attempt is not None:
        return attempt.device_kind
    job = await session.get(JobRow, job_id)
    return None if job is None else job.resolved_spec.device_kind


def _changed_fields(spec: JobSpec, resumed: JobRow) -> Iterator[tuple[str, object, object]]:
    """Every changed field that must not change: its name, its new value and its old value."""
    now: dict[str, Any] = spec.model_dump(mode="json")
    old, resolved = _with_defaults(resumed.spec), resumed.resolved_spec
    requested = {name for name in spec.model_fields_set if now[name] is not None} | _ALWAYS_COMPARED
    for name in FIXED_ON_RESUME:
        if name not in requested or name not in resolved.model_fields_set:
            continue
        old_resolved, old_requested = resolved.value(name), old.get(name)
        unknown = old_resolved is None and name not in _ALWAYS_COMPARED  # the worker hasn't resolved it yet
        then = [_results_part(name, value) for value in (old_resolved, old_requested)]
        if not unknown and _results_part(name, now[name]) not in then:
            yield name, now[name], old_requested if old_resolved is None else old_resolved
    yield from _changed_global_batch(spec, resolved)


def _results_part(name: str, value: Any) -> Any:
    """The part of a value that affects the results: DeepSpeed's stage, and an adapter without ``save_merged``."""
    if name == "use_deepspeed":
        return requested_zero_stage(value)
    if name == "lora" and value is not None:
        return {key: part for key, part in value.items() if key != "save_merged"}
    return value


def _with_defaults(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored spec with all default values, or unchanged if an earlier version accepted it and this one doesn't."""
    try:
        return JobSpec.model_validate(stored).model_dump(mode="json")
    except ValidationError:
        return stored


def _changed_global_batch(spec: JobSpec, resolved: ResolvedSpec) -> Iterator[tuple[str, object, object]]:
    """A batch split that changes the global batch size.

    With another number of processes than at the first start, the worker chooses the split.
    """
    requested = resolve(spec)
    batch_size, accumulate = requested.batch_size, requested.gradient_accumulate_every
    then = resolved.first_world_size or (None if resolved.resources is None else resolved.resources.num_processes)
    processes = spec.resources.num_processes
    if batch_size is None or accumulate is None or processes is None or processes != (then or 1):
        return
    now = batch_size * accumulate * processes
    global_batch = resolved.global_batch_size
    if global_batch is not None and now != global_batch:
        product = f"{batch_size} x {accumulate} x {processes} = {now} sequences"
        yield "batch_size", product, f"{global_batch} sequences"
