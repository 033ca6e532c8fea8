"""One attempt on this worker, from its claim to its last line stored: a state machine that the supervisor steps.

    claiming -> preparing -> training -> publishing -> over
                                (denied, or nobody answered: over)

Nothing is started without a grant. A fenced attempt (the server says that it is over) is killed at once and says
nothing more. Every step returns at once; big files are moved by the executor's threads.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pydantic import BaseModel

from worker.devices import Slot, count_cores
from worker.journal import JournalReader
from worker.launch import own_environment, training_environment
from worker.link import Outage
from worker.publish import Publisher
from worker.settings import WorkerSettings
from worker.shelf import Shelf
from worker.store import ArtifactStore, BrokenCheckpoint
from worker.training import StopAction, Training
from zeta_core.contract.checkpoint import NAME_PATTERN
from zeta_core.contract.events import StatusLine
from zeta_core.contract.job import JobError, JobStatus, StatusReason
from zeta_core.contract.layout import (
    CACHE_DIRECTORY,
    JOURNAL_FILE,
    LOG_FILE,
    PUBLISHED_FILE,
    RUN_FILE,
    RunFile,
    output_directory,
    run_directory,
)
from zeta_core.contract.messages import Claim, ClaimAnswer, HandOver, JournalAck
from zeta_core.contract.spec import TrainerOptions

CLAIM_REPEAT_SECONDS = 1.0
CLAIM_GIVE_UP_SECONDS = 60.0
LOG_SECONDS = 1.0
STORE_TRIES_SECONDS = 60.0
STORE_REST_SECONDS = 2.0
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
    """What all runs of one worker share."""

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
        self._output = Path(order.output_dir)
        self._training = Training(self.directory, order.job_id, order.attempt, place.settings.stop_grace_seconds)
        limit = order.resolved_spec.get("save_total_limit") or order.spec.get("save_total_limit")
        self._shelf = Shelf(
            place.store,
            place.executor,
            order.job_id,
            self._output,
            save_total_limit=limit if isinstance(limit, int) else DEFAULT_SAVE_TOTAL_LIMIT,
        )
        self._journal = JournalReader(self.directory / JOURNAL_FILE, self._shelf.add)
        self._publisher = Publisher(
            self._journal,
            self._shelf,
            job_id=order.job_id,
            attempt=order.attempt,
            worker=place.settings.worker_name,
        )
        self._began = time.monotonic()
        self._claimed_at = 0.0
        self._work: Future[None] | None = None
        self._failure: tuple[StatusReason, JobError] | None = None
        self._log_at = 0.0
        self._finish_since = 0.0
        self._store_trouble = Outage(f"The artifact store refuses what belongs to {order.job_id}")

    @classmethod
    def handed_over(cls, place: Place, message: HandOver, slots: Sequence[Slot]) -> Run:
        """A run that is still to be claimed."""
        settings = place.settings
        order = RunFile(
            job_id=message.job_id,
            attempt=message.attempt,
            spec=message.spec,
            resolved_spec=message.resolved_spec,
            output_dir=str(settings.root / output_directory(message.job_id)),
            cache_dir=str(settings.root / CACHE_DIRECTORY),
            artifacts_root=str(settings.artifacts),
            data_root=str(settings.data_root) if settings.data_root else None,
            hub=settings.hub != "off",
            processes=message.processes,
            slots=message.slots,
        )
        return cls(place, order, slots, resume=message.resume_from, phase=Phase.CLAIMING)

    @classmethod
    def found(cls, place: Place, order: RunFile, slots: Sequence[Slot]) -> Run:
        """A run that an earlier process of this worker started: alive, or ended and not published yet."""
        return cls(place, order, slots, resume=None, phase=Phase.TRAINING)

    @property
    def is_over(self) -> bool:
        return self.phase == Phase.OVER

    def step(self) -> list[BaseModel]:
        """Do what can be done now; returns the messages to send."""
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
        self._shelf.step()
        batch = self._publisher.due()
        return [batch] if batch is not None else []

    def answered(self, answer: ClaimAnswer) -> None:
        if self.phase != Phase.CLAIMING or answer.incarnation != self._place.incarnation:
            return
        if not answer.granted:
            logger.info("Attempt %d of %s was not granted: %s.", self.attempt, self.job_id, answer.reason)
            self.phase = Phase.OVER
            return
        self._work = self._place.executor.submit(self._prepare)
        self.phase = Phase.PREPARING

    def acknowledged(self, ack: JournalAck) -> None:
        if self.phase == Phase.CLAIMING:
            return
        self._publisher.acknowledge(ack)
        if self._publisher.is_done:
            self._forget()

    def stop(self, action: StopAction) -> None:
        if self.phase == Phase.CLAIMING:
            self.phase = Phase.OVER  # not granted yet: the server makes the hand-over again, elsewhere
        elif self.phase != Phase.OVER and self.directory.is_dir():
            self._training.stop(action)

    def fence(self) -> None:
        """The server's newer word says that this attempt is over."""
        if self.phase == Phase.CLAIMING:
            self.phase = Phase.OVER
        self._publisher.fenced = True

    # --- The phases --------------------------------------------------------------------------------------------------

    def _claim(self) -> list[BaseModel]:
        now = time.monotonic()
        if now - self._began > CLAIM_GIVE_UP_SECONDS:
            logger.warning("Nobody answered the claim of attempt %d of %s.", self.attempt, self.job_id)
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

    def _prepare(self) -> None:
        """Write the run directory and bring the checkpoint to resume from (in a thread of the executor)."""
        self.directory.mkdir(parents=True, exist_ok=True)
        own, name = self._own_checkpoint()
        self._clear_output(keep=name)
        resume_from: str | None = None
        if own and name is not None:
            self._place.store.fetch_checkpoint(self.job_id, name, self._output / name)
            resume_from = str(self._output / name)
        elif self._resume is not None:
            job_id, _, other = self._resume.partition("/")
            if not NAME_PATTERN.match(other):
                raise BrokenCheckpoint(f"{self._resume!r} is no checkpoint of a job.")
            resume_from = str(self._place.store.checkpoint(job_id, other))
        order = self._order.model_copy(update={"resume_from": resume_from})
        (self.directory / RUN_FILE).write_text(order.model_dump_json(indent=2))

    def _own_checkpoint(self) -> tuple[bool, str | None]:
        job_id, _, name = (self._resume or "").partition("/")
        own = job_id == self.job_id and NAME_PATTERN.match(name) is not None
        return own, name if own else None

    def _clear_output(self, keep: str | None) -> None:
        """Leave in the output only what the store has too: what an earlier attempt did not publish never happened."""
        self._output.mkdir(parents=True, exist_ok=True)
        for entry in self._output.iterdir():
            stored = keep is not None and self._place.store.is_stored(self.job_id, entry.name, entry)
            if entry.is_dir() and not stored:
                shutil.rmtree(entry)
            elif not entry.is_dir():
                entry.unlink()

    def _start_when_prepared(self) -> None:
        assert self._work is not None
        if not self._work.done():
            return
        error = self._work.exception()
        if error is None and self._training.stop_action is None:
            environment = training_environment(
                own_environment(),
                job_id=self.job_id,
                attempt=self.attempt,
                threads=max(1, count_cores() // self._place.num_slots),
                devices=self._devices(),
                hub=self._order.hub,
                job_env=self._place.settings.job_env,
            )
            try:
                self._training.start(self._place.command, environment)
            except OSError as not_started:
                error = not_started
        if error is not None:
            if not isinstance(error, OSError | BrokenCheckpoint):
                raise error
            message = f"The training could not be started: {error}"
            logger.error("%s", message, extra={"action": "launch", "job_id": self.job_id, "attempt": self.attempt})
            if not self.directory.is_dir():
                self.phase = Phase.OVER  # without a place for its journal the server sees that it is not listed
                return
            self._failure = (
                StatusReason.LAUNCH_FAILED,
                JobError(code=StatusReason.LAUNCH_FAILED, message=message),
            )
        self._work = None
        self.phase = Phase.TRAINING

    def _devices(self) -> list[str]:
        resources = self._order.spec.get("resources")
        if isinstance(resources, dict) and resources.get("gpus") == 0:
            return []
        return [slot.device for slot in self.slots if slot.device is not None]

    def _watch_training(self) -> None:
        self._journal.scan()
        self._copy_log()
        ended = self._journal.last_line is not None
        if not self._training.is_gone(said_its_last=ended, can_save=self._journal.has_steps):
            return
        self._journal.scan()
        if self._journal.last_line is None:
            self._journal.cut_torn_line()
            self._journal.append(self._own_last_line())
            return  # read it in the next step, with whatever came before it
        self.phase = Phase.PUBLISHING
        self._log_at = 0.0

    def _own_last_line(self) -> StatusLine:
        """What the training did not say itself."""
        match self._training.stop_action:
            case "cancel":
                return StatusLine(status=JobStatus.CANCELLED, reason=StatusReason.CANCELLED_BY_USER)
            case "pause":
                return StatusLine(status=JobStatus.PAUSED, reason=StatusReason.PAUSED_BY_USER)
            case "hand_back":
                return StatusLine(status=JobStatus.QUEUED, reason=StatusReason.HANDED_BACK)
            case None:
                failure = self._failure or self._training.failure(has_spoken=len(self._journal) > 0)
                reason, error = failure
                return StatusLine(status=JobStatus.FAILED, reason=reason, message=error.message, error=error)

    def _finish(self) -> None:
        """Nothing of the attempt is left: complete the store, then let the last line go."""
        if not self._publisher.only_the_end_is_left:
            return
        now = time.monotonic()
        if self._work is None:
            if now >= self._log_at:
                self._work = self._place.executor.submit(self._complete_store)
            return
        if not self._work.done():
            return
        error = self._work.exception()
        if error is None:
            self._store_trouble.ended()
            self._publisher.release_end()
            return
        if not isinstance(error, OSError | BrokenCheckpoint):
            raise error
        self._store_trouble.began(error)
        self._finish_since = self._finish_since or now
        if now - self._finish_since > STORE_TRIES_SECONDS:
            logger.error("The log of %s could not be completed in the artifact store: %s", self.job_id, error)
            self._publisher.release_end()
            return
        self._work, self._log_at = None, now + STORE_REST_SECONDS

    def _complete_store(self) -> None:
        """The whole log; and checkpoints as the training left them in the end (it strips what is not needed)."""
        self._place.store.append_log(self.job_id, self.attempt, self.directory / LOG_FILE)
        if self._journal.last_status != JobStatus.SUCCEEDED:
            return
        for entry in sorted(self._output.iterdir()):
            stored = self._place.store.checkpoint(self.job_id, entry.name)
            if NAME_PATTERN.match(entry.name) and stored.is_dir():
                self._place.store.put_checkpoint(self.job_id, entry.name, entry)

    def _copy_log(self) -> None:
        now = time.monotonic()
        if now < self._log_at:
            return
        self._log_at = now + LOG_SECONDS
        try:
            self._place.store.append_log(self.job_id, self.attempt, self.directory / LOG_FILE)
            self._store_trouble.ended()
        except OSError as error:
            self._store_trouble.began(error)  # tried again in a second, and before the last line is published

    def _end_fenced(self) -> None:
        if self._work is not None and not self._work.done():
            return
        self._training.kill()
        if self._training.is_gone(said_its_last=True, can_save=False):
            logger.warning("Attempt %d of %s was over for the server and was ended.", self.attempt, self.job_id)
            self._forget()

    def _forget(self) -> None:
        """The store has all that counts; an attempt that goes on elsewhere fetches it from there."""
        self.phase = Phase.OVER
        if self.directory.is_dir():
            (self.directory / PUBLISHED_FILE).touch()
        if self._output.is_dir():
            doomed = self._output.with_name(f"doomed-{self.attempt}")
            self._output.rename(doomed)  # at once: the next attempt here must not meet what is being removed
            self._place.executor.submit(shutil.rmtree, doomed)
