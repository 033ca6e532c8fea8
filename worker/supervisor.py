"""The supervising loop, which owns every training of this worker, whether started or adopted, and handles shutdown.

It runs in the main thread, handles SIGTERM and SIGINT, and never waits for Redis, a disk or a training. After either
signal, nothing new is claimed and every training is told to save and hand its job back; trainings that don't end within
their grace period are killed. The process exits once the server has stored everything, or after a time limit, even if
the artifact store hangs. The next start finds anything unpublished, including what a killed worker left behind.
"""

from __future__ import annotations

import errno
import logging
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from pydantic import BaseModel

from worker.artifacts.cleanup import sweep, sweep_deleted
from worker.artifacts.store import ArtifactStore
from worker.attempt.run import Place, Run
from worker.attempt.unpublished import unpublished_runs
from worker.checks.spec_checks import SpecChecks
from worker.machine.devices import Slot, find_slots
from worker.machine.disk import DiskSpace
from worker.messaging.consumer import Consumer
from worker.messaging.heartbeat import HeartbeatSender, WorkerState
from worker.messaging.link import RedisLink
from worker.settings import WorkerSettings
from worker.threads import GuardLimits, Outage, ProcessGuard
from worker.training.launch import own_environment
from worker.training.process_tree import KILL_SECONDS
from zeta_core.contract.wire.messages import CheckRequest, ClaimAnswer, DeviceReport, HandOver, JournalAck, StopOrder
from zeta_core.system.device_kind import cpu_kind

TICK_SECONDS = 0.1
TROUBLE_SECONDS = 2.0
PUBLISH_SECONDS = 10.0  # after the grace: for the last acknowledgements
SWEEP_SECONDS, SWEEP_FOR_ROOM_SECONDS, DELETED_SECONDS = 3600.0, 60.0, 30.0

logger = logging.getLogger(__name__)


class Supervisor:
    def __init__(
        self, settings: WorkerSettings, incarnation: str, *, version: str, command: Sequence[str], limits: GuardLimits
    ) -> None:
        self._settings = settings
        self._slots = find_slots(settings, own_environment())
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._executor = ThreadPoolExecutor(max_workers=4, thread_name_prefix="store")
        self._place = Place(
            settings, incarnation, ArtifactStore(settings.artifacts), self._executor, command, len(self._slots)
        )
        self._runs: dict[tuple[str, int], Run] = {}
        self._resting: dict[tuple[str, int], float] = {}  # after a failure: when to step the run again (monotonic)
        self._troubles: dict[tuple[str, int], Outage] = {}
        self._stopping = False
        self._disk = DiskSpace(
            (settings.root, settings.artifacts),
            settings.root / "reserve",
            min_free_bytes=settings.disk_min_free_bytes,
            executor=self._executor,
        )
        self._link = RedisLink(settings.redis_url, settings.worker_name, settings.worker_secret, self._inbox)
        self._checks = SpecChecks(
            settings, command, self._slots, lambda result: self._link.post(("check", result.check_id), result)
        )
        self._consumer = Consumer(settings, self._inbox)
        self._heartbeat = HeartbeatSender(
            settings, incarnation, version, lambda: self._report, cpu_kind=cpu_kind(own_environment())
        )
        self._loops = (self._heartbeat.loop, *self._link.loops, self._consumer.loop)
        steps = {
            "message handling": self._take_in_messages,
            "disk check": self._disk.step,
            "training supervision": self._step_runs,
            "worker report": self._tell_changes,
            "cleanup": self._sweep,
        }
        self._steps = [(step, Outage(f"The worker's {name} fails", name=name)) for name, step in steps.items()]
        self._num_rounds = 0
        outages = [outage for _, outage in self._steps]
        self._guard = ProcessGuard(self._loops, outages, lambda: self._num_rounds, limits)
        self._report = self._now()
        self._heard_at = self._heartbeat.heard_at  # the start time until a heartbeat was accepted
        self._swept_at = self._looked_at = float("-inf")
        self._sweeping: Future[None] | None = None

    def run(self) -> int:
        """Run until stopped; returns the exit status. Raises `InvalidSettings` if another worker has the same name."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._find_runs()
        self._report = self._now()
        self._heartbeat.start()
        while not self._stopping and not self._heartbeat.is_sure.wait(TICK_SECONDS):
            pass  # don't receive messages that may be for another worker with this name
        if self._heartbeat.taken is not None:
            raise self._heartbeat.taken
        self._link.start()
        self._consumer.start()
        logger.info("The worker %s offers %d slot(s).", self._settings.worker_name, len(self._slots))
        deadline = float("inf")
        self._guard.start()
        while not (self._stopping and (not self._runs or time.monotonic() > deadline)):
            if self._heartbeat.taken is not None and not self._stopping:
                logger.error("%s", self._heartbeat.taken.message, extra={"action": "name_taken"})
                self._stopping = True
            if self._stopping and deadline == float("inf"):
                deadline = self._begin_to_stop()
            self._num_rounds += 1
            for step, outage in self._steps:
                with outage.catching_errors():
                    step()
        if self._runs:
            logger.warning("%d run(s) are not fully published; the next start will publish them.", len(self._runs))
        for part in (self._guard, self._checks, self._consumer, self._heartbeat, self._link):
            with Outage(f"{type(part).__name__} cannot be stopped").catching_errors():
                part.stop()
        self._executor.shutdown(wait=False, cancel_futures=True)
        if self._heartbeat.taken is not None:
            raise self._heartbeat.taken
        return 0

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # Only set a flag: a handler that takes a lock could deadlock with the code that it interrupts.
        self._stopping = True

    def _begin_to_stop(self) -> float:
        logger.info("Stopping: telling %d training(s) to save and hand their jobs back.", len(self._runs))
        self._consumer.begin_to_stop()
        self._report = self._now()
        self._heartbeat.beat_now()
        grace = self._settings.stop_grace_seconds
        return time.monotonic() + grace + min(KILL_SECONDS, grace) + PUBLISH_SECONDS

    def _take_in_messages(self) -> None:
        """Wait up to one tick for a message, then handle all available messages."""
        try:
            self._handle(self._inbox.get(timeout=TICK_SECONDS))
            while True:
                self._handle(self._inbox.get_nowait())
        except Empty:
            return

    def _handle(self, message: BaseModel) -> None:
        match message:
            case HandOver():
                self._consider(message)
            case ClaimAnswer(job_id=job_id, attempt=attempt):
                if run := self._runs.get((job_id, attempt)):
                    run.answered(message)
            case JournalAck(job_id=job_id, attempt=attempt):
                if run := self._runs.get((job_id, attempt)):
                    run.acknowledged(message)
            case StopOrder(job_id=job_id, attempt=attempt, action=action):
                if run := self._runs.get((job_id, attempt)):
                    run.stop(action)
            case CheckRequest():
                if not self._stopping:
                    self._checks.take(message)
            case _:
                raise AssertionError(f"nobody sends {type(message).__name__} to a worker")

    def _consider(self, message: HandOver) -> None:
        """Claim a job if its slots are free. The server repeats or withdraws hand-overs that are ignored."""
        if (message.job_id, message.attempt) in self._runs:
            return
        older = [run for run in self._runs.values() if run.job_id == message.job_id]
        for run in older:
            if run.attempt < message.attempt:
                run.fence()  # the server has gone on to the next attempt, so this one is over
        taken = {slot.slot for run in self._runs.values() for slot in run.slots}
        known = {slot.slot: slot for slot in self._slots}
        wanted = set(message.slots)
        refusal = (
            "the worker is stopping"
            if self._stopping
            else "its disk is nearly full"
            if self._disk.is_low
            else "an earlier attempt is still ending"
            if older
            else f"slots {sorted(wanted)} are not free"
            if wanted & taken or not wanted or not wanted <= known.keys()
            else None
        )
        if refusal is not None:
            logger.info("Attempt %d of %s is not claimed: %s.", message.attempt, message.job_id, refusal)
            return
        slots = [known[slot] for slot in message.slots]
        run = Run.handed_over(self._place, message, slots)
        run.heard(self._heartbeat.heard_at)
        self._runs[message.job_id, message.attempt] = run

    def _step_runs(self) -> None:
        heard_at, before = self._heartbeat.heard_at, self._heard_at
        # After a long freeze, contact may be restored before this code runs; the silence still counts.
        unheard_seconds = max(time.monotonic() - heard_at, heard_at - before)
        self._heard_at = heard_at
        for key, run in list(self._runs.items()):
            if time.monotonic() < self._resting.get(key, 0.0):
                continue
            try:
                self._tell_to_stop(run, unheard_seconds)
                if heard_at > before:
                    run.heard(heard_at)
                for message in run.step():
                    self._link.post((type(message).__name__, *key), message)
            except Exception as error:  # noqa: BLE001 - the others need their supervisor; it is stepped again
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    self._disk.give_up_reserve()
                what = f"Attempt {run.attempt} of {run.job_id} cannot go on"
                self._troubles.setdefault(key, Outage(what)).begin(error)
                self._resting[key] = time.monotonic() + TROUBLE_SECONDS
            else:
                if trouble := self._troubles.pop(key, None):
                    trouble.end()
            if run.is_over:
                del self._runs[key]
                self._resting.pop(key, None)
                self._troubles.pop(key, None)

    def _tell_to_stop(self, run: Run, unheard_seconds: float) -> None:
        """Apply the worker's own stop orders; a more urgent order from the server replaces them."""
        if self._stopping or unheard_seconds >= self._settings.self_stop_seconds:
            run.stop("hand_back", in_haste=True)
        if self._disk.is_low:
            run.stop("disk", in_haste=True)
        if unheard_seconds >= self._settings.end_seconds:
            run.kill()

    def _tell_changes(self) -> None:
        """Update the report for the next heartbeat, which is sent immediately if slots or the disk state changed."""
        before, self._report = self._report, self._now()
        if (before.slots, before.disk_low) != (self._report.slots, self._report.disk_low):
            self._heartbeat.beat_now()

    def _now(self) -> WorkerState:
        return WorkerState(
            slots=self._slots_now(),
            stopping=self._stopping,
            disk_free_bytes=self._disk.free_bytes,
            disk_low=self._disk.is_low,
            failing=self._failing(),
            num_dropped=self._link.invalid.count + self._consumer.invalid.count,
        )

    def _failing(self) -> dict[str, str]:
        outages = (self._disk.outage, *(loop.outage for loop in self._loops), *(outage for _, outage in self._steps))
        failing = {outage.name: str(trouble) for outage in outages if (trouble := outage.trouble) is not None}
        if attempts := [outage.trouble for outage in self._troubles.values() if outage.trouble is not None]:
            failing["attempts"] = f"{len(attempts)} of {len(self._runs)} cannot go on; the first is {attempts[0]}"
        return failing

    def _slots_now(self) -> tuple[DeviceReport, ...]:
        by_slot = {slot.slot: run for run in self._runs.values() for slot in run.slots}
        known = [*self._slots, *(slot for run in self._runs.values() for slot in run.slots if slot not in self._slots)]
        return tuple(
            DeviceReport(
                slot=slot.slot,
                kind=slot.kind,
                name=slot.name,
                memory_bytes=slot.memory_bytes,
                device_kind=slot.device_kind,
                job_id=by_slot[slot.slot].job_id if slot.slot in by_slot else None,
                attempt=by_slot[slot.slot].attempt if slot.slot in by_slot else None,
            )
            for slot in known
        )

    def _find_runs(self) -> None:
        """Adopt the runs of an earlier process of this worker: live trainings, and ended ones not fully published."""
        for order in unpublished_runs(self._settings.home, self._settings.root):
            slots = [slot for slot in self._slots if slot.slot in order.slots] or [
                Slot(number, "cpu", "no longer offered", 0) for number in order.slots[:1] or [len(self._slots)]
            ]
            run = self._runs[order.job_id, order.attempt] = Run.found(self._place, order, slots)
            logger.info("Adopted attempt %d of %s.", order.attempt, order.job_id)
            if run.unheard_seconds >= self._settings.end_seconds:
                run.kill()  # it was frozen, or it would have ended itself; the server may have started the next attempt

    def _sweep(self) -> None:
        """Remove old files and those of deleted jobs at intervals, more often when disk space is low."""
        if self._sweeping is not None and self._sweeping.done():
            sweeping, self._sweeping = self._sweeping, None
            if error := sweeping.exception():
                logger.warning("Old files could not be removed: %s", error, extra={"action": "sweep"})
        if self._sweeping is not None:
            return
        now, root, settings = time.monotonic(), self._settings.root, self._settings
        active_jobs = {run.job_id for run in self._runs.values()}
        if now - self._swept_at >= (SWEEP_FOR_ROOM_SECONDS if self._disk.is_low else SWEEP_SECONDS):
            self._swept_at = now
            most, is_low = settings.cache_max_bytes, self._disk.is_low
            self._sweeping = self._executor.submit(sweep, root, active_jobs, cache_max_bytes=most, need_room=is_low)
        elif now - self._looked_at >= DELETED_SECONDS:
            self._looked_at = now
            self._sweeping = self._executor.submit(sweep_deleted, root, active_jobs, self._place.store)
