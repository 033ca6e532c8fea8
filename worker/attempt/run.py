"""One attempt on this worker, from its claim until its last line is stored: a state machine driven by the supervisor.

    claiming -> preparing -> training -> publishing -> over
                                (denied, or claim unanswered: over)

No training starts without a grant. A fenced attempt, which the server considers over, is killed immediately and
publishes nothing more. No step blocks; the executor's threads do the file transfers.
"""

from __future__ import annotations

import logging
import shutil
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import Enum

from pydantic import BaseModel

from worker.artifacts.archive import Archive
from worker.artifacts.checkpoint_uploads import CheckpointUploads
from worker.artifacts.job_log import JobLog
from worker.artifacts.store import ArtifactStore, BrokenCheckpoint
from worker.attempt.journal_reader import JournalReader
from worker.attempt.order import devices_of, run_file
from worker.attempt.preparation import Preparation
from worker.attempt.publisher import Publisher
from worker.attempt.verdict import failed, last_line, not_launched, over_memory
from worker.machine.devices import Slot, count_cores, memory_bytes
from worker.settings import WorkerSettings
from worker.threads import log_failure
from worker.training import processes
from worker.training.launch import own_environment, training_environment
from worker.training.memory_watch import MemoryWatch
from worker.training.process_tree import Training
from worker.training.stacks import StackDumps
from worker.training.watchdog import Watchdog, effort_of
from zeta_core.contract.job.events import StatusLine, WarningLine
from zeta_core.contract.job.status import JobStatus, StatusReason, StopAction
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.wire.messages import Claim, ClaimAnswer, HandOver, JournalAck
from zeta_core.contract.wire.run_directory import (
    JOURNAL_FILE,
    LOG_FILE,
    PUBLISHED_FILE,
    RunFile,
    log_key,
    output_directory,
    run_directory,
)

CLAIM_REPEAT_SECONDS = 1.0
CLAIM_GIVE_UP_SECONDS = 60.0
DEFAULT_SAVE_TOTAL_LIMIT = int(TrainerOptions.model_fields["save_total_limit"].default)

logger = logging.getLogger(__name__)


class Phase(Enum):
    CLAIMING = "claiming"
    PREPARING = "preparing"
    TRAINING = "training"
    PUBLISHING = "publishing"
    OVER = "over"


@dataclass(frozen=True)
class Place:
    """The resources that all runs of a worker share."""

    settings: WorkerSettings
    incarnation: str
    store: ArtifactStore
    executor: Executor
    command: Sequence[str]
    num_slots: int


class Run:
    def __init__(
        self, place: Place, order: RunFile, slots: Sequence[Slot], *, resume: str | None, phase: Phase
    ) -> None:
        """Use `handed_over` or `found`."""
        self.job_id = order.job_id
        self.attempt = order.attempt
        self.slots = tuple(slots)
        self.phase = phase
        self._place = place
        self._order = order
        self._resume = resume
        self.directory = place.settings.root / run_directory(order.job_id, order.attempt)
        self._output = place.settings.root / output_directory(order.job_id)
        self._devices = devices_of(order, slots)
        self._training = Training(
            self.directory, order.job_id, order.attempt, place.settings.stop_grace_seconds, self._devices
        )
        limit = order.resolved_spec.save_total_limit or order.spec.get("save_total_limit")
        self._uploads = CheckpointUploads(
            place.store,
            place.executor,
            order.job_id,
            self._output,
            save_total_limit=limit if isinstance(limit, int) else DEFAULT_SAVE_TOTAL_LIMIT,
        )
        settings = place.settings
        self._watchdog = Watchdog(
            factor=settings.stall_factor,
            floor_seconds=settings.stall_min_seconds,
            effort=lambda: effort_of(self._training.processes.alive()),
        )
        self._memory = MemoryWatch(
            self._training.processes.alive,
            limit_bytes=settings.job_memory_bytes,
            share_bytes=memory_bytes() * max(1, len(slots)) // place.num_slots,
        )
        self._stacks: StackDumps | None = None
        self._stalled_seconds = 0.0
        self._journal = JournalReader(self.directory / JOURNAL_FILE, self._uploads.add, self._watchdog.saw)
        stored_log = place.store.root / log_key(order.job_id, order.attempt)
        log = JobLog(self.directory / LOG_FILE, stored_log, max_bytes=place.settings.log_max_bytes)
        self._archive = Archive(place.store, place.executor, order.job_id, self._output, log)
        self._publisher = Publisher(
            self._journal,
            self._uploads,
            job_id=order.job_id,
            attempt=order.attempt,
            worker=settings.worker_name,
        )
        self._began = self._heard_at = time.monotonic()
        self._may_store = True  # false once the worker was cut off for so long that the attempt may be over
        self._claimed_at = 0.0
        self._preparation: Preparation | None = None
        self._last_word: StatusLine | None = None  # the outcome, if the worker ended the attempt itself
        self._is_opened = True  # the job's folder was created in the store; if it is missing later, the job was deleted

    @classmethod
    def handed_over(cls, place: Place, message: HandOver, slots: Sequence[Slot]) -> Run:
        """A new run that must still be claimed."""
        return cls(place, run_file(message, place.settings), slots, resume=message.resume_from, phase=Phase.CLAIMING)

    @classmethod
    def found(cls, place: Place, order: RunFile, slots: Sequence[Slot]) -> Run:
        """A run that an earlier process of this worker started: still alive, or ended but not fully published."""
        run = cls(place, order, slots, resume=None, phase=Phase.TRAINING)
        run._training.adopt()
        run._is_opened = order.is_opened
        return run

    @property
    def unheard_seconds(self) -> float:
        """The time since the training's worker last had contact with the server; 0 if unknown."""
        at = self._training.last_heard()
        return 0.0 if at is None else time.monotonic() - at

    @property
    def is_over(self) -> bool:
        return self.phase == Phase.OVER

    def step(self) -> list[BaseModel]:
        """Advance as far as possible without blocking; returns the messages to send."""
        if self._publisher.is_done and self.phase != Phase.OVER:
            self._forget()
            return []
        if self._publisher.fenced and self.phase in (Phase.PREPARING, Phase.TRAINING, Phase.PUBLISHING):
            self._end_fenced()
            return []
        match self.phase:
            case Phase.CLAIMING:
                return self._claim()
            case Phase.PREPARING:
                self._start_when_prepared()
                return []
            case Phase.TRAINING:
                self._watch_training()
            case Phase.PUBLISHING:
                self._finish()
            case Phase.OVER:
                return []
        if self._may_store:
            self._uploads.step(is_over=self.phase == Phase.PUBLISHING)
        batch = self._publisher.due()
        return [batch] if batch is not None else []

    def answered(self, answer: ClaimAnswer) -> None:
        if self.phase != Phase.CLAIMING or answer.incarnation != self._place.incarnation:
            return
        if not answer.granted:
            logger.info("Attempt %d of %s was not granted: %s.", self.attempt, self.job_id, answer.reason)
            self.phase = Phase.OVER
            return
        place = self._place
        self._preparation = Preparation(place.executor, self._order, self.directory, place.store, resume=self._resume)
        self.phase = Phase.PREPARING

    def acknowledged(self, ack: JournalAck) -> None:
        if self.phase != Phase.CLAIMING:
            self._publisher.acknowledge(ack)

    def stop(self, action: StopAction, *, in_haste: bool = False) -> None:
        if self.phase == Phase.CLAIMING:
            self.phase = Phase.OVER  # not granted yet; the server hands the job over again
        elif self.phase != Phase.OVER:
            self._training.stop(action, in_haste=in_haste)

    def heard(self, at: float) -> None:
        """Record contact with the server at this monotonic time, which allows the training to continue."""
        self._heard_at = at
        self._may_store = True
        if self.phase == Phase.TRAINING:
            self._training.heard(at)

    def kill(self) -> None:
        """Kill the training without saving: the server may soon start the next attempt, which then owns the store."""
        self._may_store = False
        if self.phase == Phase.TRAINING:
            self._training.kill()

    def fence(self) -> None:
        """Mark the attempt as over for the server."""
        if self.phase == Phase.CLAIMING:
            self.phase = Phase.OVER
        self._publisher.fenced = True

    # --- The phases --------------------------------------------------------------------------------------------------

    def _claim(self) -> list[BaseModel]:
        now = time.monotonic()
        if now - self._began > CLAIM_GIVE_UP_SECONDS:
            logger.warning("No answer to the claim of attempt %d of %s.", self.attempt, self.job_id)
            self.phase = Phase.OVER
            return []
        if now - self._claimed_at < CLAIM_REPEAT_SECONDS:
            return []
        self._claimed_at = now
        settings = self._place.settings
        return [
            Claim(
                job_id=self.job_id,
                attempt=self.attempt,
                worker=settings.worker_name,
                incarnation=self._place.incarnation,
            )
        ]

    def _is_preparing(self) -> bool:
        """Whether the preparation is still running. It is cancelled if the attempt was stopped or fenced."""
        if self._preparation is None or self._preparation.is_over:
            return False
        if self._training.stop_action is not None or self._publisher.fenced:
            self._preparation.give_up()
        return not self._preparation.is_over

    def _start_when_prepared(self) -> None:
        assert self._preparation is not None
        if self._is_preparing():
            return
        if self._preparation.was_given_up:
            self.phase = Phase.TRAINING  # nothing was started; the last line follows from the stop order
            return
        error = self._preparation.error()
        if error is None and self._training.stop_action is None:
            if self._is_earlier_one_alive():
                return
            try:
                self._training.heard(self._heard_at)
                self._training.start(self._place.command, self._environment())
            except OSError as not_started:
                error = not_started
        if error is not None:
            if not isinstance(error, OSError | BrokenCheckpoint):
                raise error
            logger.error(
                "The training could not be started: %s",
                error,
                extra={"action": "launch", "job_id": self.job_id, "attempt": self.attempt},
            )
            if not self.directory.is_dir():
                self.phase = (
                    Phase.OVER
                )  # no journal can be written; the server notices that the attempt is no longer listed
                return
            self._last_word = not_launched(error)
        self.phase = Phase.TRAINING

    def _is_earlier_one_alive(self) -> bool:
        """Whether an earlier attempt is still alive in this home, for example under a lost worker's name; kills it.

        Processes of other homes are only logged: they may belong to another service, if this database is a copy.
        """
        home, found = self._place.settings.home, self._training.processes
        if left := found.of_earlier_attempts(home):
            logger.warning("Attempt %d of %s is waiting for an earlier attempt to end.", self.attempt, self.job_id)
            processes.send(left, signal.SIGKILL)
            return True
        if others := found.of_other_homes(home):
            logger.warning(
                "%s is also running in another home on this machine, which this worker ignores: %s.",
                self.job_id,
                "; ".join(others),
                extra={"action": "other_home", "job_id": self.job_id, "attempt": self.attempt},
            )
        return False

    def _environment(self) -> dict[str, str]:
        return training_environment(
            own_environment(),
            job_id=self.job_id,
            attempt=self.attempt,
            threads=max(1, count_cores() // self._place.num_slots),
            devices=self._devices,
            hub=self._order.hub,
            job_env=self._place.settings.job_env,
        )

    def _watch_training(self) -> None:
        if not self._is_opened:
            # A run prepared by an older worker may have no folder in the store yet; create it before storing anything.
            self._place.store.open_job(self.job_id)
            self._is_opened = True
        self._journal.scan()
        self._archive.copy_log()
        self._look_for_stall()
        self._look_for_excess_memory()
        ended = self._journal.last_line is not None
        needs = self._watchdog.needs_seconds
        if not self._training.is_gone(said_its_last=ended, can_save=self._journal.has_steps, needs_seconds=needs):
            return
        self._journal.scan()
        if self._journal.last_line is None:
            self._journal.cut_torn_line()
            self._journal.append(last_line(self._training, self._last_word, has_spoken=len(self._journal) > 0))
            return  # read it in the next step, with whatever came before it
        self.phase = Phase.PUBLISHING

    def _look_for_stall(self) -> None:
        """End a stalled training, with its stacks in the log and in a warning."""
        seconds = self._watchdog.stalled_for()
        if self._stacks is None:
            if seconds is not None and self._training.stop_action is None and self._journal.last_line is None:
                self._stalled_seconds = seconds
                self._stacks = StackDumps(self._training.processes)
        elif self._last_word is None and self._stacks.step():
            message = (
                f"The training stalled: no step for {self._stalled_seconds:.0f} s, {self._watchdog.expectation()}. "
                f"{self._stacks.summary()} The attempt was ended."
            )
            stacks = self._stacks.text()
            self._journal.append(WarningLine(code=StatusReason.STALLED, message=message, stacks=stacks))
            self._last_word = failed(StatusReason.STALLED, message, log_tail=stacks)
            self._training.kill()

    def _look_for_excess_memory(self) -> None:
        if self._last_word is not None or self._journal.last_line is not None:
            return
        excess = self._memory.excess()
        if excess is not None:
            self._training.kill()
            self._last_word = over_memory(self.directory, excess)

    def _finish(self) -> None:
        """All processes have exited: complete the files in the store, then publish the last line."""
        succeeded = self._journal.last_status == JobStatus.SUCCEEDED
        if not self._publisher.only_the_end_is_left:
            return
        # A training that was never started has no log, and must not wait for a hanging store.
        if not self._training.was_started or self._archive.complete(succeeded=succeeded, keep=self._uploads.keep):
            self._publisher.release_end()

    def _end_fenced(self) -> None:
        if self._is_preparing():
            return
        self._training.kill()
        if self._training.is_gone(said_its_last=True, can_save=False):
            logger.warning("Ended attempt %d of %s, because the server considers it over.", self.attempt, self.job_id)
            self._forget()

    def _forget(self) -> None:
        """Remove the local output; the store has everything that a later attempt needs."""
        if self.directory.is_dir():
            (self.directory / PUBLISHED_FILE).touch()
        if self._output.is_dir():
            doomed = self._output.with_name(f"doomed-{self.attempt}")
            # Renamed first, so that the next attempt here doesn't see files that are being removed.
            self._output.rename(doomed)
            work = self._place.executor.submit(shutil.rmtree, doomed)
            log_failure(work, f"The local files of {self.job_id} in {doomed} could not be removed")
        self.phase = Phase.OVER
