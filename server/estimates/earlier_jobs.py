"""Estimates the training time and memory of a spec from an earlier job of the project.

Only a job with the same workload on the same kind of device is used. Nothing is extrapolated from other models,
workloads or devices: speed depends on shapes, kernels and memory in ways that a parameter count can't predict. The
estimate is based on the time per sequence, from the first step to the last. Among several such jobs, the one that
trained longest is used, because its warm-up steps weigh least.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import AttemptRow, JobRow
from server.engine.candidate import Candidate, LiveWorker
from server.engine.engine import Engine
from zeta_core.contract.job.estimate import Seconds
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.job.memory import MeasuredMemory
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.spec.affects import options_affecting
from zeta_core.contract.spec.defaults import resolve
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.spec.resources import Resources
from zeta_core.contract.spec.sources import PREFERENCE_FORMATS
from zeta_core.contract.wire.messages import Heartbeat

NEWEST_JOBS = 200  # number of successful jobs that are searched
SPEED_OPTIONS = options_affecting(JobSpec, "speed")
DOCUMENT_OPTIONS = options_affecting(JobSpec, "documents")  # they determine the length of an unpacked sequence
_NO_DEVICE = "Unknown, because no connected worker can run the job; measured in the first steps."
_NO_JOB = (
    "Unknown, because no job of this project with the same workload (model, method, seq_len, precision, batch) has "
    "succeeded on this kind of device ({}); measured in the first steps."
)


@dataclass(frozen=True)
class EarlierJob:
    """A successful job: its requested and resolved options, and its measurements."""

    id: str
    requested: ResolvedSpec
    resolved: ResolvedSpec
    sequences: int
    tokens: int
    seconds: float
    memory: dict[str, Any] | None

    def training_time(self, num_sequences: int, device: str) -> Seconds:
        """The estimated time for this many sequences, without waiting, startup and evaluations."""
        return Seconds(
            seconds=round(num_sequences * self.seconds / self.sequences, 1),
            meaning=f"of training, at the speed of {self.id} on the same kind of device ({device}); waiting, startup "
            "and evaluations not included",
            job=self.id,
            device=device,
            tokens_per_second=round(self.tokens / self.seconds, 1),
        )

    @property
    def measured_memory(self) -> MeasuredMemory | None:
        return None if self.memory is None else MeasuredMemory.model_validate({**self.memory, "job": self.id})


async def find_earlier_job(
    session: AsyncSession, engine: Engine, project: str, spec: JobSpec, resolved: ResolvedSpec
) -> tuple[EarlierJob, str] | str:
    """The earlier job and the name of its device, or why there is none; ``resolved`` is the spec as far as known."""
    beats = {beat.worker: beat for beat in engine.workers()}
    capable = [
        (candidate.heartbeat, group)
        for candidate in _candidates(engine)
        for group in candidate.groups(spec.resources)
        if group.is_large_enough
    ]
    available = {_device(beat, group.needed, on_gpus=group.gpus > 0) for beat, group in capable}
    if not available:
        return _NO_DEVICE
    requested = resolve(spec)
    succeeded = await _successful_jobs(session, project, resolved.model)
    comparable = [job for job in succeeded if _has_same_workload(requested, resolved, job)]
    workers: dict[str, set[str]] = defaultdict(set)
    attempts = select(AttemptRow.job_id, AttemptRow.worker).where(AttemptRow.job_id.in_([job.id for job in comparable]))
    for job_id, worker in await session.execute(attempts):
        workers[job_id].add(worker)
    for job in sorted(comparable, key=lambda job: job.seconds, reverse=True):
        on_gpus, resources = (job.resolved.device or "").startswith("cuda"), job.resolved.resources
        num_slots = (resources and resources.processes_per_node) or 1
        devices = {
            _device(beats[name], num_slots, on_gpus=on_gpus) if name in beats else None for name in workers[job.id]
        }
        device = devices.pop() if len(devices) == 1 else None
        if device is not None and device in available:
            return job, device
    return _NO_JOB.format(" or ".join(sorted(available)))


def resolve_gpus(engine: Engine, resources: Resources) -> Resources:
    """The resources with ``gpus="all"`` replaced by the number of GPUs of the largest connected worker."""
    if resources.gpus != "all":
        return resources
    groups = [group for candidate in _candidates(engine) for group in candidate.groups(resources)]
    return resources.model_copy(update={"gpus": max((group.gpus for group in groups), default=1)})


def _candidates(engine: Engine) -> list[Candidate]:
    live = [beat for beat in engine.workers() if engine.is_alive(beat.worker) and not beat.stopping]
    return [Candidate.of(LiveWorker(beat, ())) for beat in live]


def _device(beat: Heartbeat, num_slots: int, *, on_gpus: bool) -> str:
    """The kind of device that a job gets on this worker: its GPUs by name, or its share of the cores."""
    if on_gpus:
        return ", ".join(sorted({slot.name for slot in beat.slots if slot.kind == "cuda"}))
    num_shares = max(1, len(beat.slots))
    cores = max(1, beat.cores * min(num_slots, num_shares) // num_shares)
    return f"{cores} CPU core{'s' if cores > 1 else ''}"


async def _successful_jobs(session: AsyncSession, project: str, model: Any) -> list[EarlierJob]:
    """The newest successful jobs of this model that started at the first step and have measurements."""
    columns = (JobRow.id, JobRow.spec, JobRow.resolved_spec_json, JobRow.result, JobRow.progress)
    ended = (JobRow.project == project, JobRow.status == JobStatus.SUCCEEDED, JobRow.deleted_at.is_(None))
    newest = (
        select(*columns)
        .where(JobRow.kind == JobKind.TRAINING, *ended)
        .order_by(JobRow.created_at.desc(), JobRow.id.desc())
        .limit(NEWEST_JOBS)
    )
    jobs: list[EarlierJob] = []
    for job_id, spec_json, resolved_json, result, progress in await session.execute(newest):
        if resolved_json.get("model") != model or spec_json.get("resume_from_checkpoint"):
            continue
        resolved = ResolvedSpec.model_validate(resolved_json)
        tokens, seconds = (result or {}).get("tokens"), (result or {}).get("train_seconds")
        sequences = ((progress or {}).get("step") or 0) * (resolved.global_batch_size or 0)
        sequences = min(sequences, resolved.total_sequences or sequences)  # the last batch may be smaller
        if not (tokens and seconds and sequences):
            continue
        try:
            requested = resolve(JobSpec.model_validate(spec_json))
        except ValidationError:
            continue  # a spec of an earlier version
        memory = (result or {}).get("memory")
        jobs.append(EarlierJob(job_id, requested, resolved, sequences, tokens, seconds, memory))
    return jobs


def _has_same_workload(requested: ResolvedSpec, resolved: ResolvedSpec, job: EarlierJob) -> bool:
    """Whether all options that affect the speed are equal, either as requested or as resolved."""
    is_unpacked = not requested.pack or requested.value("method") in PREFERENCE_FORMATS
    for name in {*SPEED_OPTIONS, *DOCUMENT_OPTIONS} if is_unpacked else SPEED_OPTIONS:
        now, then = _speed_part(name, resolved), _speed_part(name, job.resolved)
        if _speed_part(name, requested) != _speed_part(name, job.requested) and (now is None or now != then):
            return False
    now, then = requested.resources, job.resolved.resources or job.requested.resources
    return (now and now.num_processes) == (then and then.num_processes)


def _speed_part(name: str, options: ResolvedSpec) -> Any:
    """The part of a value that affects the speed: ``lora.save_merged`` does not."""
    value = options.value(name)
    if name == "lora" and isinstance(value, dict):
        return {key: part for key, part in value.items() if key != "save_merged"}
    return value
