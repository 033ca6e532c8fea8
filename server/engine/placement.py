"""Chooses a worker for a job, or explains why the job waits. Uses only heartbeats, not the database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from server.engine.requirements import Requirements
from zeta_core.contract.job.status import WaitingCode
from zeta_core.contract.spec.resources import Resources
from zeta_core.contract.wire.messages import TIME_LIMIT_VERSION, Heartbeat


@dataclass(frozen=True)
class Wait:
    """The reason why a job can't be dispatched now."""

    code: WaitingCode
    details: tuple[tuple[str, JsonValue], ...] = ()
    message: str | None = None


@dataclass
class Candidate:
    """A live worker in one scheduling pass: its free slots, and the reason why it accepts no jobs, if any."""

    heartbeat: Heartbeat
    free: list[int]
    unavailable: Wait | None = None

    def has_gpus(self) -> bool:
        return any(slot.kind == "cuda" for slot in self.heartbeat.slots)

    def gpus_for(self, resources: Resources) -> int:
        """The number of GPUs that the job gets on this worker; unset means one if the worker has GPUs."""
        return resources.gpus if resources.gpus is not None else int(self.has_gpus())

    def slots_for(self, resources: Resources) -> int | None:
        """The number of slots that the job needs on this worker; ``None`` if it can never run here."""
        gpus = self.gpus_for(resources)
        if gpus and not self.has_gpus():
            return None
        needed = max(1, gpus)
        return needed if needed <= len(self.heartbeat.slots) else None

    def slots_of_kind(self, device_kind: str | None, resources: Resources) -> list[int]:
        """The slots with this device kind, including busy ones."""
        if device_kind is None:
            return []
        gpus = self.gpus_for(resources)
        return [
            slot.slot
            for slot in self.heartbeat.slots
            if (slot.device_kind if gpus else self.heartbeat.cpu_kind) == device_kind
        ]

    def reports_kinds(self) -> bool:
        return self.heartbeat.cpu_kind is not None


def choose(candidates: Sequence[Candidate], needs: Requirements) -> tuple[Candidate, list[int]] | Wait:
    """The best worker for a job and the slots to use, or the reason why the job waits.

    Free slots of ``needs.device_kind`` are preferred; among equals, the worker with the most free slots wins.
    ``resources.exact`` rules out every other kind.
    """
    resources, threads, device_kind = needs.resources, needs.threads, needs.device_kind
    if not candidates:
        return Wait(WaitingCode.NO_WORKER)
    capable = [
        (candidate, needed) for candidate in candidates if (needed := candidate.slots_for(resources)) is not None
    ]
    if not capable:
        return Wait(WaitingCode.NEVER_FITS, (("gpus", resources.gpus),))
    capable = [(candidate, needed) for candidate, needed in capable if candidate.heartbeat.cores >= threads]
    if not capable:
        message = (
            f"The job started with {threads} threads, which its exact results depend on, and no connected worker has "
            "that many cores; connect one that does."
        )
        return Wait(WaitingCode.NEVER_FITS, (("threads", threads),), message)
    if needs.timed:
        capable = [
            (candidate, needed)
            for candidate, needed in capable
            if candidate.heartbeat.contract_version >= TIME_LIMIT_VERSION
        ]
        if not capable:
            return Wait(WaitingCode.WORKER_TOO_OLD)
    other_kinds_are_free = False
    if resources.exact:
        exact = [
            (candidate, needed)
            for candidate, needed in capable
            if _is_exact_on(candidate, needed, resources, device_kind)
        ]
        if not exact:
            return _no_worker_of_kind(capable, device_kind)
        other_kinds_are_free = any(candidate.free for candidate, _ in capable)
        capable = exact
    unavailable = [candidate.unavailable for candidate, _ in capable if candidate.unavailable is not None]
    if len(unavailable) == len(capable):
        return unavailable[0]
    capable = [(candidate, needed) for candidate, needed in capable if candidate.unavailable is None]
    fitting: list[tuple[bool, Candidate, list[int]]] = []
    for candidate, needed in capable:
        matching = [slot for slot in candidate.slots_of_kind(device_kind, resources) if slot in candidate.free]
        if len(matching) >= needed:
            fitting.append((True, candidate, matching[:needed]))
        elif len(candidate.free) >= needed and not (resources.exact and device_kind is not None):
            fitting.append((False, candidate, candidate.free[:needed]))
    if fitting:
        _, candidate, slots = max(fitting, key=lambda option: (option[0], len(option[1].free)))
        return candidate, slots
    if other_kinds_are_free and device_kind is not None:
        return _wait_for_kind(WaitingCode.RESOURCES, device_kind, "all such workers are busy")
    if any(candidate.free for candidate, _ in capable):
        return Wait(WaitingCode.RESOURCES, (("gpus", resources.gpus),))
    return Wait(WaitingCode.WORKERS_BUSY)


def _is_exact_on(candidate: Candidate, needed: int, resources: Resources, device_kind: str | None) -> bool:
    """Whether a job with ``resources.exact`` may run on this worker.

    Its first attempt may run on any worker that reports device kinds.
    """
    if device_kind is None:
        return candidate.reports_kinds()
    return len(candidate.slots_of_kind(device_kind, resources)) >= needed


def _no_worker_of_kind(capable: Sequence[tuple[Candidate, int]], device_kind: str | None) -> Wait:
    if device_kind is None or not any(candidate.reports_kinds() for candidate, _ in capable):
        return Wait(WaitingCode.WORKER_TOO_OLD)
    return _wait_for_kind(WaitingCode.NEVER_FITS, device_kind, "no connected worker has this kind")


def _wait_for_kind(code: WaitingCode, device_kind: str, reason: str) -> Wait:
    message = (
        f"Waiting for a worker with device kind {device_kind} (resources.exact is true): {reason}. "
        "To continue on another kind, rerun the job from its newest checkpoint with resources.exact=false."
    )
    return Wait(code, (("device_kind", device_kind),), message)
