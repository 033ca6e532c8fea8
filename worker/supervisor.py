"""The supervising loop: it owns every attempt of this worker and handles shutdown.

It runs in the main thread, handles SIGTERM and SIGINT, and never waits for Redis, the artifact store or a run. The only
disk that it uses is the local one with the run directories. After either signal, nothing new is claimed, and every run
must save and hand its job back; runs that don't end within their grace period are killed. The process exits once the
server has stored everything, or after a time limit, even if the artifact store hangs. The next start finds anything
unpublished, including the runs of a killed worker.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from pydantic import BaseModel

from worker.artifacts.cached_inputs import CachedInputs
from worker.artifacts.cleanup import Cleanup
from worker.attempt.attempts import Attempts
from worker.attempt.resources import WorkerResources
from worker.checks.runner import SpecCheckRunner
from worker.machine.devices import background_slots, find_slots
from worker.machine.disk import DiskSpace
from worker.machine.gpu_health import GpuHealth
from worker.machine.usage import UsageMeter
from worker.messaging.consumer import Consumer
from worker.messaging.heartbeat import HeartbeatSender, WorkerState
from worker.messaging.link import RedisLink
from worker.run.launch import own_environment
from worker.run.process_tree import KILL_SECONDS
from worker.run.sandbox import Sandboxes
from worker.run.warm_start import WarmStart
from worker.serving.served_models import ServedModels
from worker.settings import WorkerSettings
from worker.threads import GuardLimits, Outage, ProcessGuard
from zeta_core.contract.errors import InvalidSettings
from zeta_core.contract.wire.answers import AnswerControl, AnswerRequest
from zeta_core.contract.wire.messages import (
    CheckRequest,
    ClaimAnswer,
    Dispatch,
    Go,
    JournalAck,
    SaveRequest,
    SecretRejected,
    StopRequest,
)
from zeta_core.system.artifact_store import open_store
from zeta_core.system.device_kind import cpu_kind
from zeta_core.system.sandbox import SandboxSupport

TICK_SECONDS = 0.1
QUICK_TICK_SECONDS = 0.01  # while an attempt waits for a short piece of work, such as the upload of its log
PUBLISH_SECONDS = 10.0  # after the grace period, for the last acknowledgements

logger = logging.getLogger(__name__)


class Supervisor:
    def __init__(
        self,
        settings: WorkerSettings,
        incarnation: str,
        *,
        version: str,
        command: Sequence[str],
        limits: GuardLimits,
        sandbox: SandboxSupport | None,
    ) -> None:
        """``sandbox`` is what confines runs; ``None`` if that is switched off."""
        self._settings = settings
        self._incarnation = incarnation
        self._stopping = False
        self._start_time = time.monotonic()
        self._rejection: InvalidSettings | None = None  # why the server accepts no message of this worker
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._executor = ThreadPoolExecutor(max_workers=4, thread_name_prefix="store")
        store = open_store(settings)
        slots = find_slots(settings, own_environment())
        self._num_slots = len(slots)
        self._warm_start = WarmStart.of_worker(settings, slots, command)
        sandboxes = Sandboxes(settings, sandbox if sandbox is not None and sandbox.is_available else None)
        gpus = [slot.gpu for slot in slots if slot.gpu is not None]
        self._usage = UsageMeter(gpus, self._executor)
        self._cached_inputs = CachedInputs(settings.root / "cached_inputs.json")
        resources = WorkerResources(
            settings,
            incarnation,
            store,
            self._executor,
            command,
            len(slots),
            self._warm_start,
            sandboxes,
            self._usage,
            self._cached_inputs,
        )
        self._link = RedisLink(settings.redis_url, settings.worker_key, self._inbox)
        self._consumer = Consumer(settings, self._inbox)
        self._disk = DiskSpace(
            (settings.root, settings.artifacts),
            settings.root / "reserve",
            min_free_bytes=settings.disk_min_free_bytes,
            executor=self._executor,
        )
        self._gpu_health = GpuHealth(gpus, self._executor)
        self._attempts = Attempts(
            resources, slots, background_slots(settings, slots), self._disk, self._gpu_health, self._link.post
        )
        self._checks = SpecCheckRunner(
            settings,
            command,
            slots,
            lambda result: self._link.post(("check", result.check_id), result),
            store,
            sandboxes,
        )
        self._serving = ServedModels(settings, command, slots, resources.threads, self._link.post, store, sandboxes)
        self._dispatches: dict[str, Dispatch] = {}  # by job: those that wait for served models to leave their slots
        self._cleanup = Cleanup(settings.root, store, self._executor, cache_max_bytes=settings.cache_max_bytes)
        self._heartbeat = self._new_heartbeat(version, sandbox)
        self._last_contact = self._heartbeat.last_contact  # the start time until a heartbeat was accepted
        self._steps = self._list_steps()
        self._threads = (self._heartbeat.thread, *self._link.threads, self._consumer.thread)
        self._num_rounds = 0
        outages = [outage for _, outage in self._steps]
        self._guard = ProcessGuard(self._threads, outages, lambda: self._num_rounds, limits)
        self._state = self._current_state()

    def _new_heartbeat(self, version: str, sandbox: SandboxSupport | None) -> HeartbeatSender:
        return HeartbeatSender(
            self._settings,
            self._incarnation,
            version,
            lambda: self._state,
            cpu_kind=cpu_kind(own_environment()),
            sandbox="off" if sandbox is None else str(sandbox),
        )

    def _list_steps(self) -> list[tuple[Callable[[], None], Outage]]:
        """The steps of a round in their order, each with the report of its failures."""
        steps: dict[str, Callable[[], None]] = {
            "message handling": self._handle_messages,
            "disk check": self._disk.step,
            "GPU check": self._check_gpus,
            "usage measurement": self._usage.step,
            "warm start": self._step_warm_start,
            "serving": self._step_serving,
            "training supervision": self._step_attempts,
            "worker report": self._report_changes,
            "cleanup": self._clean_up,
        }
        return [(step, Outage(f"The worker's {name} fails", name=name)) for name, step in steps.items()]

    def run(self) -> int:
        """Run until stopped; returns the exit status.

        Raises `InvalidSettings` if another worker has the same name, or if the server rejects the worker's secret.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._attempts.adopt()
        self._serving.end_earlier()
        self._connect()
        deadline = float("inf")
        while not (self._stopping and (self._is_over or time.monotonic() > deadline)):
            self._stop_if_due()
            if self._stopping and deadline == float("inf"):
                deadline = self._begin_to_stop()
            self._num_rounds += 1
            for step, outage in self._steps:
                with outage.catching_errors():
                    step()
        self._shut_down()
        if self._heartbeat.name_conflict is not None:
            raise self._heartbeat.name_conflict
        if self._rejection is not None:
            raise self._rejection
        return 0

    @property
    def _is_over(self) -> bool:
        """Whether a stopping worker has nothing left to do."""
        return not self._attempts and self._serving.is_over

    # --- Starting and stopping ---------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Send heartbeats, and receive messages once no other worker uses this name. Raises `InvalidSettings`."""
        self._state = self._current_state()
        self._heartbeat.start()
        while not self._stopping and not self._heartbeat.is_name_checked.wait(TICK_SECONDS):
            pass  # don't receive messages that may be for another worker with this name
        if self._heartbeat.name_conflict is not None:
            raise self._heartbeat.name_conflict
        self._link.start()
        self._consumer.start()
        logger.info("The worker %s offers %d slot(s).", self._settings.worker_name, self._num_slots)
        self._guard.start()

    def _stop_if_due(self) -> None:
        """Stop if another worker has the same name, or after ``stop_after_seconds``."""
        if self._stopping:
            return
        if self._heartbeat.name_conflict is not None:
            logger.error("%s", self._heartbeat.name_conflict.message, extra={"action": "name_taken"})
            self._stopping = True
        limit = self._settings.stop_after_seconds
        if limit is not None and time.monotonic() >= self._start_time + limit:
            logger.info("The worker has run for %.0f s (ZETA_STOP_AFTER_SECONDS).", limit, extra={"action": "stop"})
            self._stopping = True

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # Only set a flag: a handler that takes a lock could deadlock with the code that it interrupts.
        self._stopping = True

    def _begin_to_stop(self) -> float:
        """Accept no more jobs; returns the time when the process must exit (monotonic)."""
        logger.info("Stopping: %d run(s) must save and hand their jobs back.", len(self._attempts))
        self._consumer.begin_to_stop()
        self._serving.stop()
        self._state = self._current_state()
        self._heartbeat.beat_now()
        grace = self._settings.stop_grace_seconds
        return time.monotonic() + grace + min(KILL_SECONDS, grace) + PUBLISH_SECONDS

    def _shut_down(self) -> None:
        if self._attempts:
            logger.warning(
                "%d attempt(s) are not fully published; the next start will publish them.", len(self._attempts)
            )
        warm_start = () if self._warm_start is None else (self._warm_start,)
        for part in (self._guard, self._checks, *warm_start, self._consumer, self._heartbeat, self._link):
            with Outage(f"{type(part).__name__} cannot be stopped").catching_errors():
                part.stop()
        self._executor.shutdown(wait=False, cancel_futures=True)

    # --- The steps of a round ----------------------------------------------------------------------------------------

    def _handle_messages(self) -> None:
        """Wait up to one tick for a message, then handle all available messages."""
        tick_seconds = QUICK_TICK_SECONDS if self._attempts.expect_change else TICK_SECONDS
        try:
            self._handle(self._inbox.get(timeout=tick_seconds))
            while True:
                self._handle(self._inbox.get_nowait())
        except Empty:
            return

    def _handle(self, message: BaseModel) -> None:
        match message:
            case Dispatch():
                self._dispatches[message.job_id] = message
                self._accept_dispatches()
            case AnswerRequest():
                self._serving.take(message, self._slots_of_jobs)
            case AnswerControl():
                self._serving.control(message)
            case ClaimAnswer() | Go() | JournalAck() | StopRequest() | SaveRequest():
                self._attempts.deliver(message)
            case SecretRejected():
                self._stop_rejected(message)
            case CheckRequest():
                if not self._stopping:
                    self._checks.take(message)
            case _:
                raise AssertionError(f"nobody sends {type(message).__name__} to a worker")

    def _stop_rejected(self, message: SecretRejected) -> None:
        """Stop this process, because the server accepts none of its messages."""
        if message.incarnation == self._incarnation and not self._stopping:
            self._rejection = InvalidSettings(
                f"The server rejects the secret of this worker: {message.reason}.", param="ZETA_WORKER_SECRET"
            )
            logger.error("%s", self._rejection.message, extra={"action": "secret_rejected"})
            self._stopping = True

    def _check_gpus(self) -> None:
        self._gpu_health.step(self._attempts.used_devices | self._serving.used_devices)

    def _accept_dispatches(self) -> None:
        """Accept the jobs whose slots are no longer used by served models; for the others, models are ended."""
        for job_id, message in list(self._dispatches.items()):
            if self._serving.evict(message.slots):
                del self._dispatches[job_id]
                last_contact = self._heartbeat.last_contact
                self._attempts.accept(message, is_stopping=self._stopping, last_contact=last_contact)

    @property
    def _slots_of_jobs(self) -> set[int]:
        """The slots that can't serve models now."""
        dispatched = {slot for dispatch in self._dispatches.values() for slot in dispatch.slots}
        return self._attempts.used_slots | self._attempts.unusable_slots | dispatched

    def _step_serving(self) -> None:
        self._accept_dispatches()
        self._serving.step(self._slots_of_jobs)

    def _step_warm_start(self) -> None:
        if self._warm_start is not None:
            self._warm_start.step(is_idle=not self._stopping and not self._attempts.any_is_starting)

    def _step_attempts(self) -> None:
        before, self._last_contact = self._last_contact, self._heartbeat.last_contact
        # After a long freeze, contact may be restored before this code runs; the time without contact still counts.
        seconds_without_contact = max(time.monotonic() - self._last_contact, self._last_contact - before)
        self._attempts.step(
            is_stopping=self._stopping,
            contact_at=self._last_contact if self._last_contact > before else None,
            seconds_without_contact=seconds_without_contact,
        )

    def _report_changes(self) -> None:
        """Update the state for the next heartbeat, which is sent immediately if slots or the disk state changed."""
        before, self._state = self._state, self._current_state()
        after = self._state
        if (before.all_slots, before.disk_low) != (after.all_slots, after.disk_low):
            self._heartbeat.beat_now()

    def _clean_up(self) -> None:
        if self._disk.is_low:
            self._cached_inputs.clear()
        self._cleanup.step(self._attempts.active_jobs, disk_is_low=self._disk.is_low)

    # --- The state for the heartbeat ---------------------------------------------------------------------------------

    def _current_state(self) -> WorkerState:
        return WorkerState(
            slots=tuple(
                report.model_copy(update={"served": self._serving.reports(report.slot)})
                for report in self._attempts.slot_reports()
            ),
            background_slots=self._attempts.background_slot_reports(),
            stopping=self._stopping,
            disk_free_bytes=self._disk.free_bytes,
            disk_low=self._disk.is_low,
            failing=self._failing(),
            num_dropped=self._link.invalid.count + self._consumer.invalid.count,
            usage=self._usage.latest,
            cached_inputs=self._cached_inputs.keys,
        )

    def _failing(self) -> dict[str, str]:
        threads, steps = self._threads, self._steps
        outages = (
            self._disk.outage,
            self._gpu_health.outage,
            self._usage.outage,
            *(thread.outage for thread in threads),
            *(outage for _, outage in steps),
        )
        failing = {outage.name: str(trouble) for outage in outages if (trouble := outage.trouble) is not None}
        if attempts := self._attempts.failing():
            failing["attempts"] = attempts
        return failing
