"""What a job that resumes another one's checkpoint may have different: exact resume is held when the job is submitted.

A worker holds it again with everything it knows (the data's tokens, the model's own limits); what is refused here would
be refused there, minutes later. What is left out takes the value of the run that goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import AttemptRow, CheckpointRow, JobRow
from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.spec.affects import options_affecting
from zeta_core.contract.spec.deepspeed import stage_of
from zeta_core.contract.spec.defaults import resolve
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.spec.validation import error_of, shown

# A worker rejects a change of these, too (`zeta_core.plan.KEPT`). All other fields may change.
FIXED_ON_RESUME = options_affecting(JobSpec, "results")
# Left out, these still mean something else than what a run may have been started with.
_ALWAYS_COMPARED = frozenset({"tokenizer", "use_pretokenized", "use_fsdp", "use_deepspeed", "lora", "method"})


async def check_exact_resume(session: AsyncSession, spec: JobSpec) -> None:
    """Raise `InvalidSpec` naming every field that the run whose checkpoint is resumed was started without.

    The checkpoint itself is there: `references.check_references` has seen it.
    """
    job_id, _, name = (spec.resume_from_checkpoint or "").partition("/")
    resumed = await session.get(JobRow, job_id) if job_id else None
    if resumed is None:
        return
    weights = f'"model": {{"job": "{job_id}", "checkpoint": "{name or "latest"}"}}'
    details = [
        ErrorDetail(
            param=param,
            message=f"{param} is {shown(now)}, but {job_id} was started with {shown(then)}, and a resumed run goes on "
            f'exactly; keep it, rerun with "from": "start", or begin from the weights: {weights} without '
            "resume_from_checkpoint.",
            code="changed_on_resume",
        )
        for param, now, then in _changed(spec, resumed)
    ]
    if details:
        raise error_of(details)


async def device_kind_of(session: AsyncSession, resumed: str) -> str | None:
    """The kind of device that computed a checkpoint, ``job_...`` or ``job_.../step-N``; the next attempt prefers it."""
    job_id, _, name = resumed.partition("/")
    checkpoint = await session.get(CheckpointRow, (job_id, name)) if name else None
    attempt = None if checkpoint is None else await session.get(AttemptRow, (job_id, checkpoint.attempt))
    if attempt is not None:
        return attempt.device_kind
    job = await session.get(JobRow, job_id)
    return None if job is None else job.resolved_spec.device_kind


def _changed(spec: JobSpec, resumed: JobRow) -> Iterator[tuple[str, object, object]]:
    """Each field that must not change and does: its name, its value, and the one that the run was started with."""
    now: dict[str, Any] = spec.model_dump(mode="json")
    asked, decided = _with_defaults(resumed.spec), resumed.resolved_spec
    given = {name for name in spec.model_fields_set if now[name] is not None} | _ALWAYS_COMPARED
    for name in FIXED_ON_RESUME:
        if name not in given or name not in decided.model_fields_set:
            continue
        resolved, sent = decided.value(name), asked.get(name)
        unknown = resolved is None and name not in _ALWAYS_COMPARED  # the worker has not decided it yet
        then = [_of_the_training(name, value) for value in (resolved, sent)]
        if not unknown and _of_the_training(name, now[name]) not in then:
            yield name, now[name], sent if resolved is None else resolved
    yield from _changed_global_batch(spec, decided)


def _of_the_training(name: str, value: Any) -> Any:
    """What of a field's value the training depends on: of DeepSpeed the stage, of an adapter not how it is saved."""
    if name == "use_deepspeed":
        return stage_of(value)
    if name == "lora" and value is not None:
        return {key: part for key, part in value.items() if key != "save_merged"}
    return value


def _with_defaults(sent: dict[str, Any]) -> dict[str, Any]:
    """A spec that was accepted once, its objects with all their fields; as it was sent where today's words differ."""
    try:
        return JobSpec.model_validate(sent).model_dump(mode="json")
    except ValidationError:
        return sent


def _changed_global_batch(spec: JobSpec, resolved: ResolvedSpec) -> Iterator[tuple[str, object, object]]:
    """A batch split that changes the global batch size.

    With another number of processes than at the first start, the worker chooses the split.
    """
    asked = resolve(spec)
    batch_size, accumulate = asked.batch_size, asked.gradient_accumulate_every
    then = resolved.first_world_size or (None if resolved.resources is None else resolved.resources.processes)
    processes = spec.resources.processes
    if batch_size is None or accumulate is None or (processes or 1) != (then or 1):
        return
    now = batch_size * accumulate * (processes or 1)
    global_batch = resolved.global_batch_size
    if global_batch is not None and now != global_batch:
        product = f"{batch_size} x {accumulate} x {processes or 1} = {now} sequences"
        yield "batch_size", product, f"{global_batch} sequences"
