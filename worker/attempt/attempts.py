"""The attempts of this worker, whether started or adopted: accepting dispatches, stepping each, reporting the slots."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from pydantic import BaseModel

from worker.attempt.attempt import LocalAttempt
from worker.attempt.resources import WorkerResources
from worker.attempt.run_file import unpublished_run_files
from worker.machine.devices import Slot
from worker.machine.disk import DiskSpace
from worker.machine.gpu_health import GpuHealth
from worker.threads import Outage
from zeta_core.contract.job.responses import DeviceReport
from zeta_core.contract.wire.messages import ClaimAnswer, Dispatch, Go, JournalAck, SaveRequest, StopRequest

RETRY_SECONDS = 2.0  # before an attempt that failed to advance is stepped again

logger = logging.getLogger(__name__)


class Attempts:
    """A failure of one attempt is an outage of that attempt, which is retried; the others are not affected."""

    def __init__(
        self,
        resources: WorkerResources,
        slots: Sequence[Slot],
        background_slots: Sequence[Slot],
        disk: DiskSpace,
        gpu_health: GpuHealth,
        send: Callable[[tuple[object, ...], BaseModel], None],
    ) -> None:
        """``send`` sends a message, which replaces an unsent one with the same key."""
        self._resources = resources
        self._slots = slots
        self._background_slots = background_slots
        self._all_slots = (*slots, *background_slots)
        self._disk = disk
        self._gpu_health = gpu_health
        self._send = send
        self._attempts: dict[tuple[str, int], LocalAttempt] = {}
        self._retry_at: dict[tuple[str, int], float] = {}  # monotonic
        self._outages: dict[tuple[str, int], Outage] = {}

    def __len__(self) -> int:
        return len(self._attempts)

    @property
    def active_jobs(self) -> set[str]:
        return {attempt.job_id for attempt in self._attempts.values()}

    @property
    def used_devices(self) -> set[str]:
        """The GPUs of the attempts, as in ``CUDA_VISIBLE_DEVICES``."""
        slots = (slot for attempt in self._attempts.values() for slot in attempt.slots)
        return {slot.device for slot in slots if slot.device is not None}

    @property
    def used_slots(self) -> set[int]:
        return {slot.slot for attempt in self._attempts.values() for slot in attempt.slots}

    @property
    def unusable_slots(self) -> set[int]:
        """The slots whose GPUs must not be assigned."""
        return {slot.slot for slot in self._slots if self._problem(slot) is not None}

    @property
    def any_is_starting(self) -> bool:
        return any(attempt.is_starting for attempt in self._attempts.values())

    @property
    def expect_change(self) -> bool:
        """Whether one of them can probably advance within moments."""
        return any(attempt.expects_change for attempt in self._attempts.values())

    def adopt(self) -> None:
        """Adopt the attempts that an earlier process of this worker left running or unpublished."""
        settings = self._resources.settings
        for run_file in unpublished_run_files(settings.home, settings.root):
            slots = [slot for slot in self._all_slots if slot.slot in run_file.slots] or [
                Slot(number, "cpu", "no longer offered", 0) for number in run_file.slots[:1] or [len(self._all_slots)]
            ]
            attempt = LocalAttempt.adopt(self._resources, run_file, slots)
            self._attempts[run_file.job_id, run_file.attempt] = attempt
            logger.info("Adopted attempt %d of %s.", run_file.attempt, run_file.job_id)
            if attempt.seconds_without_contact >= settings.end_seconds:
                # It was frozen; otherwise it would have ended itself. The server may have started the next attempt.
                attempt.kill()

    def accept(self, message: Dispatch, *, is_stopping: bool, last_contact: float) -> None:
        """Claim a job if its slots are free. The server repeats or withdraws dispatches that are ignored."""
        if (message.job_id, message.attempt) in self._attempts:
            return
        older = [attempt for attempt in self._attempts.values() if attempt.job_id == message.job_id]
        for attempt in older:
            if attempt.attempt < message.attempt:
                attempt.fence()  # the server has started the next attempt, so this one is over
        by_number = {slot.slot: slot for slot in self._all_slots}
        refusal = self._refusal(message, by_number, is_stopping=is_stopping, is_earlier_ending=bool(older))
        if refusal is not None:
            logger.info("Attempt %d of %s is not claimed: %s.", message.attempt, message.job_id, refusal)
            return
        slots = [by_number[number] for number in message.slots]
        attempt = LocalAttempt.from_dispatch(self._resources, message, slots)
        attempt.record_contact(last_contact)
        self._attempts[message.job_id, message.attempt] = attempt
        if self._resources.cached_inputs is not None:
            self._resources.cached_inputs.add(message.inputs)

    def _refusal(
        self, message: Dispatch, by_number: Mapping[int, Slot], *, is_stopping: bool, is_earlier_ending: bool
    ) -> str | None:
        """Why the job is not claimed, if there is a reason; ``by_number`` are this worker's slots."""
        if is_stopping:
            return "the worker is stopping"
        if self._disk.is_low:
            return "its disk is nearly full"
        if is_earlier_ending:
            return "an earlier attempt is still ending"
        requested = set(message.slots)
        if requested & self.used_slots or not requested or not requested <= by_number.keys():
            return f"slots {sorted(requested)} are not free"
        problems = (self._problem(by_number[number]) for number in message.slots)
        return next((problem for problem in problems if problem is not None), None)

    def deliver(self, message: ClaimAnswer | Go | JournalAck | StopRequest | SaveRequest) -> None:
        """Pass a message on to its attempt, if this worker has it."""
        attempt = self._attempts.get((message.job_id, message.attempt))
        if attempt is None:
            return
        match message:
            case ClaimAnswer():
                attempt.handle_answer(message)
            case Go(group=group, incarnation=incarnation):
                attempt.start_node(group, incarnation)
            case JournalAck():
                attempt.acknowledge(message)
            case StopRequest(action=action):
                attempt.stop(action)
            case SaveRequest(number=number):
                attempt.request_save(number)

    def step(self, *, is_stopping: bool, contact_at: float | None, seconds_without_contact: float) -> None:
        """Advance each attempt; ``contact_at`` is the time of a new contact with the server (monotonic), if any."""
        for key, attempt in list(self._attempts.items()):
            if time.monotonic() < self._retry_at.get(key, 0.0):
                continue
            try:
                self._apply_own_stop_requests(attempt, is_stopping, seconds_without_contact)
                if contact_at is not None:
                    attempt.record_contact(contact_at)
                for message in attempt.step():
                    self._send((type(message).__name__, *key), message)
            except Exception as error:  # noqa: BLE001 - the other attempts need their supervisor; this one is retried
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    self._disk.release_reserve()
                description = f"Attempt {attempt.attempt} of {attempt.job_id} cannot continue"
                self._outages.setdefault(key, Outage(description)).begin(error)
                self._retry_at[key] = time.monotonic() + RETRY_SECONDS
            else:
                if outage := self._outages.pop(key, None):
                    outage.end()
            if attempt.is_over:
                del self._attempts[key]
                self._retry_at.pop(key, None)
                self._outages.pop(key, None)

    def _apply_own_stop_requests(
        self, attempt: LocalAttempt, is_stopping: bool, seconds_without_contact: float
    ) -> None:
        """Apply the worker's own stop requests; a more urgent one from the server replaces them."""
        settings = self._resources.settings
        if is_stopping or seconds_without_contact >= settings.self_stop_seconds:
            attempt.stop("hand_back", grace_only=True)
        if self._disk.is_low:
            attempt.stop("disk", grace_only=True)
        if seconds_without_contact >= settings.end_seconds:
            attempt.kill()

    def failing(self) -> str | None:
        """A description of the attempts that cannot continue, if any."""
        troubles = [outage.trouble for outage in self._outages.values() if outage.trouble is not None]
        return f"{len(troubles)} of {len(self)} cannot continue; the first is {troubles[0]}" if troubles else None

    def _problem(self, slot: Slot) -> str | None:
        """Why the slot's GPU must not be assigned, if there is a reason."""
        return None if slot.device is None else self._gpu_health.problems.get(slot.device)

    def slot_reports(self) -> tuple[DeviceReport, ...]:
        """Each slot with the attempt that uses it, including slots of adopted attempts that are no longer offered."""
        used = [slot for attempt in self._attempts.values() for slot in attempt.slots]
        return self._reports((*self._slots, *(slot for slot in used if slot not in self._all_slots)))

    def background_slot_reports(self) -> tuple[DeviceReport, ...]:
        """Each background slot with the attempt that uses it."""
        return self._reports(self._background_slots)

    def _reports(self, slots: Sequence[Slot]) -> tuple[DeviceReport, ...]:
        by_slot = {slot.slot: attempt for attempt in self._attempts.values() for slot in attempt.slots}
        return tuple(
            DeviceReport(
                slot=slot.slot,
                kind=slot.kind,
                name=slot.name,
                memory_bytes=slot.memory_bytes,
                device_kind=slot.device_kind,
                device=slot.device,
                is_mig=slot.gpu is not None and slot.gpu.is_mig,
                problem=self._problem(slot),
                job_id=by_slot[slot.slot].job_id if slot.slot in by_slot else None,
                attempt=by_slot[slot.slot].attempt if slot.slot in by_slot else None,
            )
            for slot in slots
        )
