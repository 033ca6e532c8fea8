"""The live workers as the scheduler sees them: from their heartbeats, and from what was dispatched to them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from server.engine.candidate import Candidate, LiveWorker, Wait
from server.engine.load import Load
from zeta_core.contract.job.status import WaitingCode
from zeta_core.contract.wire.messages import Heartbeat


def live_workers(beats: Iterable[Heartbeat], load: Load, drained: Collection[str]) -> tuple[LiveWorker, ...]:
    """The workers of these heartbeats, except those that are stopping."""
    return tuple(_live_worker(beat, load, drained) for beat in beats if not beat.stopping)


def situation_of(worker: LiveWorker) -> object:
    """Everything about a worker that decides which jobs fit, and why the others wait."""
    beat = worker.heartbeat
    machine = beat.contract_version, beat.cores, beat.cpu_kind, beat.labels, beat.all_slots
    return beat.worker, *machine, worker.free, worker.free_background, worker.unavailable


def has_free_slot(workers: Iterable[LiveWorker]) -> bool:
    return any(worker.free and worker.unavailable is None for worker in workers)


def has_usable_slot(candidates: Iterable[Candidate]) -> bool:
    """Whether a further job might get a slot, perhaps a reserved one for a limited time."""
    return any(
        candidate.unavailable is None
        and (candidate.free or any(seconds is not None for seconds in candidate.reserved.values()))
        for candidate in candidates
    )


def _live_worker(beat: Heartbeat, load: Load, drained: Collection[str]) -> LiveWorker:
    """The worker with its free slots, those whose served models would be ended last."""
    taken = load.slots.get(beat.worker, set())
    free = sorted(
        (slot for slot in beat.slots if slot.job_id is None and slot.slot not in taken),
        key=lambda slot: len(slot.served),
    )
    background = [slot.slot for slot in beat.background_slots if slot.job_id is None and slot.slot not in taken]
    return LiveWorker(
        beat,
        tuple(slot.slot for slot in free),
        _unavailable_reason(beat, drained),
        tuple(background),
        load.seconds_left.get(beat.worker, {}),
    )


def _unavailable_reason(beat: Heartbeat, drained: Collection[str]) -> Wait | None:
    """The reason why a live worker accepts no jobs, if any."""
    if beat.worker in drained:
        return Wait(WaitingCode.NO_WORKER, message="All workers that could run the job are being drained.")
    return Wait(WaitingCode.DISK, (("worker", beat.worker),)) if beat.disk_low else None
