"""The process tree of one attempt: starting or adopting it, stopping it, and detecting that it is gone.

A tree is gone when its first process has exited, no live process has its mark, its lock is free, and the driver reports
no GPU memory held by its processes. Processes that outlive the first one get SIGTERM, then SIGKILL. An adopted tree,
which an earlier process of the worker started, differs in two points: its first process is looked up instead of waited
for, and its exit status is unknown.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from pydantic import ValidationError

from worker.machine.devices import memory_holders
from worker.training import processes
from worker.training.launch import start_training
from worker.training.processes import RunProcesses
from zeta_core.contract.job.job import JobError, JobErrorEvidence
from zeta_core.contract.job.status import REASON_SENTENCES, STOP_ACTIONS, StatusReason, StopAction
from zeta_core.contract.wire.run_directory import (
    ALIVE_FILE,
    DISK_FULL_EXIT,
    LOG_FILE,
    PROCESS_FILE,
    STOP_FILE,
    ProcessFile,
    StopFile,
)
from zeta_core.system.durable_files import write_atomically
from zeta_core.system.oom_kills import OomKills, count_oom_kills, oom_kill_error

LOOK_SECONDS = 0.5  # scanning all processes takes milliseconds
SIGNAL_SECONDS = 0.5  # between two rounds of signals
CANCEL_SECONDS = 5.0  # after this, a stopped training that has nothing to save gets SIGTERM
KILL_SECONDS = 5.0  # from SIGTERM to SIGKILL
COUNT_SECONDS = 10.0  # interval for recording the processes of a training on GPUs
DRIVER_SECONDS = 60.0  # after this, the driver's report is ignored
LOG_TAIL_BYTES = 4000
UNKNOWN_STATUS = (
    "The training process ended without a final status. "
    "Its exit status is unknown, because its worker was restarted while it ran; see the end of its log."
)

logger = logging.getLogger(__name__)


class Training:
    def __init__(
        self, directory: Path, job_id: str, attempt: int, grace_seconds: float, devices: Sequence[str] = ()
    ) -> None:
        """Starts nothing; use `start` or `adopt`."""
        self.directory = directory
        self.job_id = job_id
        self.attempt = attempt
        self.processes = RunProcesses(directory, job_id, attempt)
        self.stop_action: StopAction | None = None
        self._grace_seconds = grace_seconds
        self._devices = devices
        self._numbers: set[int] = set()  # ids of all processes of the tree that were seen
        self._next_count = 0.0
        self._holding_since: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._adopted: _AdoptedLeader | None = None
        self._oom_kills = count_oom_kills()
        self._stopped_at = 0.0
        self._grace_only = False
        self._needs_seconds = 0.0
        self._is_killed = False
        self._left_since: float | None = None
        self._overstayed_since: float | None = None
        self._sent_sigterm = False
        self._next_look = 0.0
        self._next_signal = 0.0
        self._gone = False

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Raises `OSError` if the program cannot be started."""
        self._process = start_training(command, self.directory, environment)
        record = ProcessFile(
            pid=self._process.pid, group_oom_kills=self._oom_kills.group, machine_oom_kills=self._oom_kills.machine
        )
        with contextlib.suppress(OSError):  # a full disk must not end the training that was just started
            (self.directory / PROCESS_FILE).write_text(record.model_dump_json())

    def adopt(self) -> None:
        """Adopt the tree and the stop request of an earlier process of the worker."""
        try:
            recorded = ProcessFile.model_validate_json((self.directory / PROCESS_FILE).read_bytes())
            self._oom_kills = OomKills(recorded.group_oom_kills, recorded.machine_oom_kills)
        except (FileNotFoundError, ValidationError):
            recorded = None  # started by an older worker, or the worker was killed at that moment
        self._adopted = _AdoptedLeader(self.processes, recorded.pid if recorded is not None else None)
        try:
            file = self.directory / STOP_FILE
            self.stop_action = StopFile.model_validate_json(file.read_bytes()).action
            # The limits count from the request, not from this restart. The clock may have been set since, so the age is
            # at most the grace period: a training that saves always has the usual time between SIGTERM and SIGKILL.
            age_seconds = min(max(0.0, time.time() - file.stat().st_mtime), self._grace_seconds)
            self._stopped_at = time.monotonic() - age_seconds
        except (FileNotFoundError, ValidationError):
            return  # no request, or one of another version; the server repeats its requests

    @property
    def was_started(self) -> bool:
        """Whether this or an earlier process of the worker started it."""
        return self._process is not None or (self.directory / LOG_FILE).exists()

    def record_contact(self, at: float) -> None:
        """Record the last contact with the server for the training (`time.monotonic`, shared by all processes)."""
        file = os.open(self.directory / ALIVE_FILE, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(file, f"{at:020.3f}\n".encode(), 0)  # overwritten in place, which also works on a full disk
        finally:
            os.close(file)

    def last_contact(self) -> float | None:
        """The last recorded contact, by this or an earlier process of the worker since the machine was booted."""
        try:
            at = float((self.directory / ALIVE_FILE).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return at if at <= time.monotonic() else None

    def stop(self, action: StopAction, *, grace_only: bool = False) -> None:
        """Request the training to end. A more urgent request replaces an earlier one; repeating one has no effect.

        ``grace_only``: the worker itself must end, so a long step or save gets no more than the grace period.
        """
        self._grace_only = self._grace_only or grace_only
        if self.stop_action is not None and STOP_ACTIONS.index(action) <= STOP_ACTIONS.index(self.stop_action):
            return
        self.stop_action = action
        self._stopped_at = time.monotonic()
        self._sent_sigterm = False
        if not self.directory.is_dir():
            return  # still being prepared; it won't be started
        try:
            write_atomically(self.directory / STOP_FILE, StopFile(action=action).model_dump_json().encode())
        except OSError as error:
            self._log(f"could not be given its stop file and gets SIGTERM instead ({error})")
            processes.send(self._alive(), signal.SIGTERM)

    def kill(self) -> None:
        """Kill every process of the attempt; `is_gone` repeats this until they are gone."""
        if not self._is_killed:
            self._is_killed = True
            self._kill_all()

    def is_gone(self, *, has_ended: bool, can_save: bool, needs_seconds: float = 0.0) -> bool:
        """Take one step towards the end and return whether the tree is gone; never blocks.

        ``has_ended``: the journal has its last line, so the processes have no reason to live on. ``can_save``: it
        has made a step, so that stopping it may take the time of a save. ``needs_seconds``: what its step or save under
        way may take beyond the grace, where nothing has to be done in haste.
        """
        self._needs_seconds = 0.0 if self._grace_only else needs_seconds
        if self._gone:
            return True
        now = time.monotonic()
        if self._devices and now >= self._next_count:
            self._next_count = now + COUNT_SECONDS
            self._alive()
        if self._is_leader_alive(now):
            self._escalate(now, has_ended=has_ended, can_save=can_save)
            return False
        if now < self._next_look:
            return False
        self._next_look = now + LOOK_SECONDS
        left = self._alive()
        if not left and not processes.is_unlocked(self.directory):
            left = self.processes.lock_holders()
        if left:
            self._end_what_is_left(left, now)
            return False
        self._gone = processes.is_unlocked(self.directory) and not self._holds_memory(now)
        return self._gone

    def failure(self, *, has_journal: bool) -> tuple[StatusReason, JobError]:
        """The failure of a training without a final status. ``has_journal`` means that its journal has lines."""
        status = self._process.returncode if self._process is not None else None
        evidence = JobErrorEvidence(exit_code=status, log_tail=self._log_tail())
        if status is None:
            # The signal is unknown, so only an OOM kill in our own control group can be attributed to the training.
            if count_oom_kills().since(self._oom_kills) == "group":
                error = oom_kill_error(self.directory, self._oom_kills, evidence)
                if error is not None:
                    return StatusReason.OUT_OF_MEMORY, error
            return StatusReason.PROCESS_KILLED, JobError(
                code=StatusReason.PROCESS_KILLED, message=UNKNOWN_STATUS, evidence=evidence
            )
        if status < 0:
            name = signal.Signals(-status).name
            evidence = evidence.model_copy(update={"exit_code": None, "signal": name})
            if status == -signal.SIGKILL:
                error = oom_kill_error(self.directory, self._oom_kills, evidence)
                if error is not None:
                    return StatusReason.OUT_OF_MEMORY, error
            message = f"The training process was killed by {name}."
            return StatusReason.PROCESS_KILLED, JobError(
                code=StatusReason.PROCESS_KILLED, message=message, evidence=evidence
            )
        if status == DISK_FULL_EXIT:
            message = REASON_SENTENCES[StatusReason.DISK_FULL]
            return StatusReason.DISK_FULL, JobError(code=StatusReason.DISK_FULL, message=message, evidence=evidence)
        reason = StatusReason.TRAIN_ERROR if has_journal else StatusReason.LAUNCH_FAILED
        message = (
            f"The training process ended with exit code {status} without reporting an error; see the end of its log."
        )
        return reason, JobError(code=reason, message=message, evidence=evidence)

    def _is_leader_alive(self, now: float) -> bool:
        """Whether the first process is alive, so that the tree ends by itself after a stop request."""
        if self._process is not None:
            return self._process.poll() is None
        return self._adopted is not None and self._adopted.is_alive(now)

    def _escalate(self, now: float, *, has_ended: bool, can_save: bool) -> None:
        """Send SIGTERM, then SIGKILL, if the first process is alive too long after a stop request or its last line."""
        if now < self._next_signal:
            return
        if self._is_killed:
            self._kill_all()
            return
        if self.stop_action is not None:
            saves = can_save and self.stop_action != "cancel"
            grace = self._grace_seconds
            limit = grace + self._needs_seconds if saves else min(CANCEL_SECONDS, grace)
            since = self._stopped_at
        elif has_ended:
            self._overstayed_since = self._overstayed_since or now
            limit, since = self._grace_seconds, self._overstayed_since
        else:
            return
        is_loading = self.stop_action is not None and not can_save  # it ignores the stop file, but handles SIGTERM
        if now - since < limit and (self._sent_sigterm or not is_loading):
            return
        if not self._sent_sigterm:
            self._sent_sigterm = True
            if not is_loading:
                self._log("did not end in time and gets SIGTERM")
            self._signal_all(signal.SIGTERM)
        elif now - since >= limit + (
            0.0 if is_loading and self.stop_action == "cancel" else min(KILL_SECONDS, self._grace_seconds)
        ):
            self._log("did not end after SIGTERM and is killed")
            self._kill_all()

    def _alive(self) -> list[psutil.Process]:
        found = self.processes.alive()
        self._numbers.update(process.pid for process in found)
        return found

    def _holds_memory(self, now: float) -> bool:
        """Whether the driver still lists one of its processes, as it may for a while after the process has ended."""
        left = self._numbers & memory_holders(self._devices) if self._devices else set[int]()
        if not left:
            return False
        self._holding_since = self._holding_since or now
        if now - self._holding_since < DRIVER_SECONDS:
            return True
        self._log(f"is gone, but the driver reports that processes {sorted(left)} hold memory on its GPUs")
        return False

    def _kill_all(self) -> None:
        self._signal_all(signal.SIGKILL)

    def _signal_all(self, number: signal.Signals) -> None:
        self._next_signal = time.monotonic() + SIGNAL_SECONDS
        processes.send(self._alive(), number)

    def _end_what_is_left(self, left: Sequence[psutil.Process], now: float) -> None:
        if self._left_since is None:
            self._left_since = now
            self._log(f"left {len(left)} process(es) behind, which are ended")
            processes.send(left, signal.SIGTERM)
        elif now - self._left_since >= min(KILL_SECONDS, self._grace_seconds):
            processes.send(left, signal.SIGKILL)

    def _log(self, what: str) -> None:
        logger.warning(
            "Attempt %d of %s %s.",
            self.attempt,
            self.job_id,
            what,
            extra={"action": "end_training", "job_id": self.job_id, "attempt": self.attempt},
        )

    def _log_tail(self) -> str | None:
        try:
            with (self.directory / LOG_FILE).open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
                return log.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return None


class _AdoptedLeader:
    """Whether the first process of an adopted tree lives.

    Where its process id is not known, every process of the tree is taken for the first, so that none is ended as a
    leftover.
    """

    def __init__(self, tree: RunProcesses, pid: int | None) -> None:
        self._tree = tree
        self._is_known = pid is not None
        self._process = next((process for process in tree.alive() if process.pid == pid), None)
        self._any_alive = True
        self._next_look = 0.0

    def is_alive(self, now: float) -> bool:
        if self._is_known:
            return self._process is not None and processes.is_alive(self._process)
        if self._any_alive and now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._any_alive = bool(self._tree.alive())
        return self._any_alive
