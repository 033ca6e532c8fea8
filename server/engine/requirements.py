"""Determines what a queued job needs from a worker: from its spec, and from the decisions of its earlier attempts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.database.tables import JobRow
from zeta_core.contract.job.kind import BACKGROUND_KINDS, JobKind
from zeta_core.contract.spec.resources import Elastic, Resources, node_counts


@dataclass(frozen=True)
class Requirements:
    """Jobs with equal requirements fit on the same workers.

    ``node_counts`` are the numbers of workers on which the job may run together, in the order of preference.
    ``threads`` is the minimum number of cores for each process. ``max_seconds`` is the job's time limit, which older
    workers can't enforce. ``device_kind`` is the kind of device that computed the job so far.
    """

    resources: Resources
    threads: int = 1
    max_seconds: float | None = None
    device_kind: str | None = None
    kind: JobKind = JobKind.TRAINING
    node_counts: tuple[int, ...] = (1,)

    @property
    def is_background(self) -> bool:
        """Whether the job runs in a background slot."""
        return self.kind in BACKGROUND_KINDS

    @property
    def takes_one_slot(self) -> bool:
        """Whether the job takes a single slot wherever it runs."""
        gpus, processes = self.resources.gpus, self.resources.processes
        return gpus != "all" and max(gpus or 0, processes or 0) <= 1 and max(self.node_counts) == 1


def requirements_of(job: JobRow) -> Requirements:
    """The requirements of a job whose whole row is loaded."""
    spec, resolved = job.spec, job.resolved_spec_json
    return requirements(
        kind=job.kind,
        attempt=job.attempt or 0,
        resources=spec.get("resources"),
        resolved_resources=resolved.get("resources"),
        resolved_threads=resolved.get("threads"),
        device_kind=resolved.get("device_kind"),
        time_limit=spec.get("time_limit_seconds"),
        resumed=spec.get("resume_from_checkpoint"),
        elastic=spec.get("elastic"),
        global_batch_size=resolved.get("global_batch_size"),
    )


def requirements(
    *,
    kind: str | None,
    attempt: int,
    resources: Mapping[str, Any] | None,
    resolved_resources: Mapping[str, Any] | None,
    resolved_threads: Any,
    device_kind: Any,
    time_limit: Any,
    resumed: Any,
    elastic: Any = None,
    global_batch_size: Any = None,
) -> Requirements:
    """The requirements of a job with these fields in its spec and its resolved spec, after this many attempts."""
    job_kind = JobKind(kind or JobKind.TRAINING)
    if job_kind in BACKGROUND_KINDS:
        return Requirements(Resources(gpus=0), kind=job_kind)
    known_kind = device_kind if isinstance(device_kind, str) else None
    fixed = _fixed_resources(attempt, Resources.model_validate(resources or {}), resolved_resources, known_kind)
    threads = 1
    # On a CPU, exact results depend on the job's initial thread count. A job that resumes another job's checkpoint
    # doesn't wait for cores: if its thread count differs, it gets the warning `threads_changed`.
    if attempt and not fixed.gpus and resumed is None and isinstance(resolved_threads, int):
        threads = resolved_threads
    counts = [fixed.nodes]
    if attempt and elastic is not None and isinstance(global_batch_size, int):
        counts = node_counts(fixed, Elastic.model_validate(elastic), global_batch_size) or counts
    max_seconds = float(time_limit) if isinstance(time_limit, int | float) else None
    return Requirements(fixed, threads, max_seconds, known_kind, job_kind, tuple(counts))


def _fixed_resources(
    attempt: int, requested: Resources, resolved: Mapping[str, Any] | None, device_kind: str | None
) -> Resources:
    """The requested resources; once a job has started, its number of GPUs, or its choice of a CPU, is fixed.

    Exact results depend on that number. For the same reason it is fixed for a job with ``resources.exact`` that resumes
    another job's checkpoint.
    """
    if isinstance(requested.gpus, int):
        return requested
    if not attempt:
        kind = device_kind if requested.exact and requested.gpus is None else None
        if kind is None:
            return requested
        gpus = 0 if kind.startswith("cpu:") else requested.processes or 1
        return requested.model_copy(update={"gpus": gpus})
    return requested.model_copy(update={"gpus": (resolved or {}).get("gpus")})
