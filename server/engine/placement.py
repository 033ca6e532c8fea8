"""Which worker fits a job now, or why the job waits: decided from heartbeats alone, without the database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from zeta_core.contract.job import WaitingCode
from zeta_core.contract.messages import TIME_LIMIT_VERSION, Heartbeat
from zeta_core.contract.spec import Resources


@dataclass(frozen=True)
class Wait:
    """Why a job is not handed over now."""

    code: WaitingCode
    details: tuple[tuple[str, JsonValue], ...] = ()
    message: str | None = None


@dataclass
class Room:
    """One live worker in one pass: its slots, those still free, and why it takes no job although it lives."""

    heartbeat: Heartbeat
    free: list[int]
    closed: Wait | None = None

    def has_gpus(self) -> bool:
        return any(slot.kind == "cuda" for slot in self.heartbeat.slots)

    def gpus_for(self, resources: Resources) -> int:
        """How many GPUs the job gets here; unset means one where there are some."""
        return resources.gpus if resources.gpus is not None else int(self.has_gpus())

    def slots_for(self, resources: Resources) -> int | None:
        """How many slots the job takes here; ``None`` where it could never run."""
        gpus = self.gpus_for(resources)
        if gpus and not self.has_gpus():
            return None
        needed = max(1, gpus)
        return needed if needed <= len(self.heartbeat.slots) else None

    def of_kind(self, device_kind: str | None, resources: Resources) -> list[int]:
        """The slots on which the job would have this kind of device, taken ones included."""
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


def choose(
    rooms: Sequence[Room],
    resources: Resources,
    *,
    threads: int = 1,
    timed: bool = False,
    device_kind: str | None = None,
) -> tuple[Room, list[int]] | Wait:
    """The best worker among those where the job fits now, or why it waits.

    Free slots of ``device_kind``, on which the job was computed so far, come first, then the worker with the most free
    slots. With ``resources.exact`` no other kind will do. ``threads``: of each process, on so many cores. ``timed``:
    the job has a time limit, whose stop order older workers do not know.
    """
    if not rooms:
        return Wait(WaitingCode.NO_WORKER)
    able = [(room, needed) for room in rooms if (needed := room.slots_for(resources)) is not None]
    if not able:
        return Wait(WaitingCode.NEVER_FITS, (("gpus", resources.gpus),))
    able = [(room, needed) for room, needed in able if room.heartbeat.cores >= threads]
    if not able:
        message = (
            f"The training began with {threads} threads, on which its bits depend, and no connected worker has as "
        )
        return Wait(WaitingCode.NEVER_FITS, (("threads", threads),), message + "many cores; connect one that has.")
    if timed:
        able = [(room, needed) for room, needed in able if room.heartbeat.contract_version >= TIME_LIMIT_VERSION]
        if not able:
            return Wait(WaitingCode.WORKER_TOO_OLD)
    others_are_free = False
    if resources.exact:
        exact = [(room, needed) for room, needed in able if _is_exact_on(room, needed, resources, device_kind)]
        if not exact:
            return _no_worker_of_the_kind(able, device_kind)
        others_are_free = any(room.free for room, _ in able)
        able = exact
    closed = [room.closed for room, _ in able if room.closed is not None]
    if len(closed) == len(able):
        return closed[0]
    able = [(room, needed) for room, needed in able if room.closed is None]
    fitting: list[tuple[bool, Room, list[int]]] = []
    for room, needed in able:
        alike = [slot for slot in room.of_kind(device_kind, resources) if slot in room.free]
        if len(alike) >= needed:
            fitting.append((True, room, alike[:needed]))
        elif len(room.free) >= needed and not (resources.exact and device_kind is not None):
            fitting.append((False, room, room.free[:needed]))
    if fitting:
        _, room, slots = max(fitting, key=lambda found: (found[0], len(found[1].free)))
        return room, slots
    if others_are_free and device_kind is not None:
        return _wait_for_the_kind(WaitingCode.RESOURCES, device_kind, "every such worker is busy")
    if any(room.free for room, _ in able):
        return Wait(WaitingCode.RESOURCES, (("gpus", resources.gpus),))
    return Wait(WaitingCode.WORKERS_BUSY)


def _is_exact_on(room: Room, needed: int, resources: Resources, device_kind: str | None) -> bool:
    """Whether a job with ``resources.exact`` may run there; its first attempt may, wherever kinds are reported."""
    if device_kind is None:
        return room.reports_kinds()
    return len(room.of_kind(device_kind, resources)) >= needed


def _no_worker_of_the_kind(able: Sequence[tuple[Room, int]], device_kind: str | None) -> Wait:
    if device_kind is None or not any(room.reports_kinds() for room, _ in able):
        return Wait(WaitingCode.WORKER_TOO_OLD)
    return _wait_for_the_kind(WaitingCode.NEVER_FITS, device_kind, "no connected worker has it")


def _wait_for_the_kind(code: WaitingCode, device_kind: str, why: str) -> Wait:
    message = (
        f"The job waits for a worker with the device kind {device_kind}, because resources.exact is true; {why}. "
        "Rerun it from its newest checkpoint with resources.exact false to continue on another kind."
    )
    return Wait(code, (("device_kind", device_kind),), message)
