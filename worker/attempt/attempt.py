"""One attempt on this worker, from its claim until its last line is stored: a state machine driven by the supervisor.

    claiming -> preparing -> [prepared ->] running -> publishing -> over
                                            (denied, or claim unanswered: over)

An attempt on several workers is prepared until all of them are, and the server lets it start.

Nothing starts without a grant. A fenced attempt, which the server considers over, is killed immediately and
publishes nothing more. No step blocks; the executor's threads transfer the files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from enum import Enum

from pydantic import BaseModel

from worker.attempt.final_line import final_line, launch_failure_line
from worker.attempt.monitor import RunMonitor
from worker.attempt.output import AttemptOutput
from worker.attempt.preparation import Preparation
from worker.attempt.resources import WorkerResources
from worker.attempt.run_file import new_run_file
from worker.attempt.run_file_signature import read_signed, write_signed
from worker.attempt.run_launcher import RunLauncher
from worker.attempt.start_messages import ClaimRequests, NodeStart
from worker.machine.devices import Slot, memory_bytes, visible_gpus
from worker.run.process_tree import ProcessTree
from zeta_core.contract.job.events import StatusLine
from zeta_core.contract.job.status import StopAction
from zeta_core.contract.wire.messages import Claim, ClaimAnswer, Dispatch, JournalAck
from zeta_core.contract.wire.node_group import NodeGroup
from zeta_core.contract.wire.run_directory import SAVE_FILE, RunFile, SaveFile, run_directory
from zeta_core.system.artifact_store import BrokenCheckpoint
from zeta_core.system.durable_files import write_atomically

QUICK_SECONDS = 2.0  # for which a new stage is expected to end soon, before something must be slow

logger = logging.getLogger(__name__)


class Phase(Enum):
    CLAIMING = "claiming"
    PREPARING = "preparing"
    PREPARED = "prepared"  # one of several nodes, which waits for the others
    RUNNING = "running"
    PUBLISHING = "publishing"
    OVER = "over"


class LocalAttempt:
    def __init__(
        self,
        resources: WorkerResources,
        run_file: RunFile,
        slots: Sequence[Slot],
        *,
        resume_from: str | None,
        phase: Phase,
    ) -> None:
        """Use `from_dispatch` or `adopt`. ``resume_from`` names a stored checkpoint as ``job_.../step-N``."""
        settings = resources.settings
        self.job_id = run_file.job_id
        self.attempt = run_file.attempt
        self.slots = tuple(slots)
        self.phase = phase
        self.directory = settings.root / run_directory(run_file.job_id, run_file.attempt)
        self._resources = resources
        self._run_file = run_file
        self._resume_from = resume_from
        devices = visible_gpus(run_file.spec, slots)
        self._claim = ClaimRequests(
            Claim(
                job_id=self.job_id,
                attempt=self.attempt,
                worker=settings.worker_name,
                incarnation=resources.incarnation,
            )
        )
        self._preparation: Preparation | None = None
        self._node_start: NodeStart | None = None  # of one of several nodes that is prepared
        self._launcher = RunLauncher(resources, run_file, self.directory, devices, len(slots))
        self._tree = ProcessTree(self.directory, self.job_id, self.attempt, settings.stop_grace_seconds, devices)
        memory_share = memory_bytes() * max(1, len(slots)) // resources.num_slots
        self._monitor = RunMonitor(self._tree, settings, run_file.num_nodes, memory_share_bytes=memory_share)
        record_progress = self._monitor.watchdog.record_progress
        self._output = AttemptOutput(resources, run_file, self.directory, devices, record_progress)
        self._launch_failure: StatusLine | None = None
        self._last_contact = time.monotonic()
        self._stage: tuple[Phase, bool] = (phase, False)  # the second value: whether the journal has its last line
        self._stage_since = time.monotonic()
        self._save_request = 0  # the number of the newest one that was passed on to the run
        self._may_store = True  # false once the worker was cut off for so long that the attempt may be over

    @classmethod
    def from_dispatch(cls, resources: WorkerResources, message: Dispatch, slots: Sequence[Slot]) -> LocalAttempt:
        """A new attempt that must still be claimed."""
        run_file = new_run_file(message, resources.settings)
        return cls(resources, run_file, slots, resume_from=message.resume_from, phase=Phase.CLAIMING)

    @classmethod
    def adopt(cls, resources: WorkerResources, run_file: RunFile, slots: Sequence[Slot]) -> LocalAttempt:
        """An attempt that an earlier process of this worker started: still alive, or ended but not fully published."""
        attempt = cls(resources, run_file, slots, resume_from=None, phase=Phase.RUNNING)
        attempt._tree.adopt()
        attempt._output.adopt()
        return attempt

    @property
    def is_over(self) -> bool:
        return self.phase == Phase.OVER

    @property
    def seconds_without_contact(self) -> float:
        """The time since the run's worker last had contact with the server; 0 if unknown."""
        at = self._tree.last_contact()
        return 0.0 if at is None else time.monotonic() - at

    @property
    def is_starting(self) -> bool:
        """Whether it has not made its first step yet."""
        is_loading = self.phase == Phase.RUNNING and not self._output.journal.has_steps
        return self.phase in (Phase.CLAIMING, Phase.PREPARING, Phase.PREPARED) or is_loading

    @property
    def expects_change(self) -> bool:
        """Whether file transfers or the end of a process probably let it advance within moments."""
        phase, has_ended = self._stage
        is_short = phase in (Phase.PREPARING, Phase.PUBLISHING) or has_ended
        return is_short and time.monotonic() - self._stage_since < QUICK_SECONDS

    def step(self) -> list[BaseModel]:
        """Advance as far as possible without blocking; returns the messages to send."""
        messages = self._advance()
        stage = (self.phase, self._output.journal.last_line is not None)
        if stage != self._stage:
            self._stage, self._stage_since = stage, time.monotonic()
        return messages

    def _advance(self) -> list[BaseModel]:
        if self._output.publisher.is_done and self.phase != Phase.OVER:
            self._leave()
            return []
        if self._output.publisher.is_fenced and self.phase not in (Phase.CLAIMING, Phase.OVER):
            self._end_fenced()
            return []
        match self.phase:
            case Phase.CLAIMING:
                return self._request_grant()
            case Phase.PREPARING:
                self._start_when_prepared()
                return []
            case Phase.PREPARED:
                return self._wait_for_other_nodes()
            case Phase.RUNNING:
                self._supervise_run()
            case Phase.PUBLISHING:
                self._output.finish(was_started=self._tree.was_started)
            case Phase.OVER:
                return []
        if self._may_store:
            self._output.upload_checkpoints(is_over=self.phase == Phase.PUBLISHING)
        batch = self._output.publisher.next_batch()
        return [batch] if batch is not None else []

    # --- Messages and stop requests ----------------------------------------------------------------------------------

    def handle_answer(self, answer: ClaimAnswer) -> None:
        if self.phase != Phase.CLAIMING or answer.incarnation != self._resources.incarnation:
            return
        if not answer.granted:
            logger.info("Attempt %d of %s was not granted: %s.", self.attempt, self.job_id, answer.reason)
            self.phase = Phase.OVER
            return
        executor, store = self._resources.executor, self._resources.store
        self._preparation = Preparation(
            executor,
            self._run_file,
            self.directory,
            store,
            resume=self._resume_from,
            prepare_sandbox=self._launcher.prepare_sandbox,
        )
        self.phase = Phase.PREPARING

    def start_node(self, group: NodeGroup, incarnation: str) -> None:
        """Start the run: all its nodes are prepared."""
        if self._node_start is None or self.phase != Phase.PREPARED or incarnation != self._resources.incarnation:
            return
        run_file = RunFile.model_validate_json(read_signed(self.directory))
        self._run_file = run_file.model_copy(update={"node_group": group})
        write_signed(self.directory, self._run_file.model_dump_json(indent=2).encode())
        self._node_start.release_port()
        self.phase = Phase.PREPARING

    def acknowledge(self, ack: JournalAck) -> None:
        if self.phase != Phase.CLAIMING:
            self._output.publisher.acknowledge(ack)

    def stop(self, action: StopAction, *, grace_only: bool = False) -> None:
        if self.phase == Phase.CLAIMING:
            self.phase = Phase.OVER  # not granted yet; the server dispatches the job again
        elif self.phase != Phase.OVER:
            self._tree.stop(action, grace_only=grace_only)

    def request_save(self, number: int) -> None:
        """Let the run save a checkpoint and continue. The server repeats this until the checkpoint is stored."""
        if self.phase == Phase.RUNNING and number > self._save_request:
            write_atomically(self.directory / SAVE_FILE, SaveFile(number=number).model_dump_json().encode())
            self._save_request = number

    def record_contact(self, at: float) -> None:
        """Record contact with the server at this monotonic time, which allows the run to continue."""
        self._last_contact = at
        self._may_store = True
        if self.phase == Phase.RUNNING:
            self._tree.record_contact(at)

    def kill(self) -> None:
        """Kill the run without saving: the server may soon start the next attempt, which then owns the store."""
        self._may_store = False
        if self.phase == Phase.RUNNING:
            self._tree.kill()

    def fence(self) -> None:
        """Mark the attempt as over for the server."""
        if self.phase == Phase.CLAIMING:
            self.phase = Phase.OVER
        self._output.publisher.is_fenced = True

    # --- The phases --------------------------------------------------------------------------------------------------

    def _request_grant(self) -> list[BaseModel]:
        if self._claim.has_timed_out:
            logger.warning("No answer to the claim of attempt %d of %s.", self.attempt, self.job_id)
            self.phase = Phase.OVER
            return []
        return self._claim.due()

    def _is_preparing(self) -> bool:
        """Whether the preparation is still running. It is cancelled if the attempt was stopped or fenced."""
        if self._preparation is None or self._preparation.is_over:
            return False
        if self._tree.stop_action is not None or self._output.publisher.is_fenced:
            self._preparation.cancel()
        return not self._preparation.is_over

    def _start_when_prepared(self) -> None:
        assert self._preparation is not None
        if self._is_preparing():
            return
        if self._preparation.was_cancelled:
            self.phase = Phase.RUNNING  # nothing was started; the last line follows from the stop request
            return
        error = self._preparation.error()
        if error is None and self._tree.stop_action is None:
            if self._run_file.num_nodes > 1 and self._run_file.node_group is None:
                self._node_start = NodeStart(
                    self._resources.executor, self._resources.settings, self._claim.claim, self._run_file.node_rank
                )
                self.phase = Phase.PREPARED
                return
            if self._tree.processes.kill_earlier_attempts(self._resources.settings.home):
                return
            try:
                self._tree.record_contact(self._last_contact)
                if not self._launcher.start(self._tree):
                    return
            except OSError as not_started:
                error = not_started
        if error is not None:
            self._fail_to_start(error)
        else:
            self.phase = Phase.RUNNING

    def _wait_for_other_nodes(self) -> list[BaseModel]:
        """Report that this node is prepared, until `start_node` or a stop request."""
        assert self._node_start is not None
        if self._tree.stop_action is not None:
            self._node_start.release_port()
            self.phase = Phase.RUNNING  # nothing was started; the last line follows from the stop request
            return []
        error = self._node_start.error()
        if error is not None:
            self._fail_to_start(error)
            return []
        return self._node_start.due()

    def _fail_to_start(self, error: BaseException) -> None:
        if not isinstance(error, OSError | BrokenCheckpoint):
            raise error
        logger.error(
            "The training process could not be started: %s",
            error,
            extra={"action": "launch", "job_id": self.job_id, "attempt": self.attempt},
        )
        if not self.directory.is_dir():
            # No journal can be written; the server notices that the worker no longer lists the attempt.
            self.phase = Phase.OVER
            return
        self._launch_failure = launch_failure_line(error)
        self.phase = Phase.RUNNING

    def _supervise_run(self) -> None:
        self._output.collect()
        journal = self._output.journal
        if self._launch_failure is None:
            self._monitor.check(journal)
        has_ended = journal.last_line is not None
        needs_seconds = self._monitor.watchdog.needs_seconds
        if not self._tree.is_gone(has_ended=has_ended, can_save=journal.has_steps, needs_seconds=needs_seconds):
            return
        journal.scan()
        if journal.last_line is None:
            journal.cut_torn_line()
            worker_line = self._launch_failure or self._monitor.final_line
            journal.append(final_line(self._tree, worker_line, has_journal=len(journal) > 0))
            return  # read it in the next step, with any lines before it
        self.phase = Phase.PUBLISHING

    def _end_fenced(self) -> None:
        if self._is_preparing():
            return
        self._tree.kill()
        if self._tree.is_gone(has_ended=True, can_save=False):
            logger.warning("Ended attempt %d of %s, because the server considers it over.", self.attempt, self.job_id)
            self._leave()

    def _leave(self) -> None:
        if self._node_start is not None:
            self._node_start.release_port()
        self._output.remove_local_files()
        self.phase = Phase.OVER
