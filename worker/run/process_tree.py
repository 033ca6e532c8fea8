"""The process tree of one attempt: starting or adopting it, stopping it, and detecting that it is gone.

A tree is gone when its first process has exited, no live process has its mark, its lock is free, and the driver reports
no GPU memory held by its processes. Processes that outlive the first one get SIGTERM, then SIGKILL. An adopted tree,
which an earlier process of the worker started, differs in two points: its first process is looked up instead of waited
for, and its exit status is unknown.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import ValidationError

from worker.machine.gpus import memory_holders
from worker.run import processes
from worker.run.fork_server import Fork
from worker.run.leader import LOOK_SECONDS, AdoptedLeader, ForkedLeader, StartedLeader
from worker.run.processes import RunProcesses
from worker.run.warm_start import WarmStart
from zeta_core.contract.job.status import STOP_ACTIONS, StopAction
from zeta_core.contract.wire.run_directory import ALIVE_FILE, LOG_FILE, STOP_FILE, StopFile
from zeta_core.system.durable_files import write_atomically
from zeta_core.system.oom_kills import count_oom_kills

SIGNAL_SECONDS = 0.5  # between two rounds of signals
CANCEL_SECONDS = 5.0  # after this, a stopped run that has nothing to save gets SIGTERM
KILL_SECONDS = 5.0  # from SIGTERM to SIGKILL
COUNT_SECONDS = 10.0  # interval for recording the processes of a run on GPUs
DRIVER_SECONDS = 60.0  # after this, the driver's report is ignored

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _StopRequest:
    action: StopAction
    since: float  # monotonic


class ProcessTree:
    def __init__(
        self, directory: Path, job_id: str, attempt: int, grace_seconds: float, devices: Sequence[str] = ()
    ) -> None:
        """Starts nothing; use `start` or `adopt`."""
        self.directory = directory
        self.job_id = job_id
        self.attempt = attempt
        self.processes = RunProcesses(directory, job_id, attempt)
        self.oom_kills = count_oom_kills()  # before the run started
        self._grace_seconds = grace_seconds
        self._fork: Fork | None = None  # the request to the fork server, if there was one
        self._leader: StartedLeader | ForkedLeader | AdoptedLeader | None = None
        self._gpu_memory = _GpuMemory(devices)
        self._request: _StopRequest | None = None
        self._grace_only = False
        self._is_killed = False
        self._sent_sigterm = False  # for the current stop request, or because its journal has ended
        self._next_signal = 0.0  # this and all following times are monotonic
        self._next_look = 0.0
        self._ended_at: float | None = None  # when its journal's last line was seen while the first process was alive
        self._left_since: float | None = None  # when processes were found that had outlived the first one
        self._gone = False

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], warm_start: WarmStart | None = None
    ) -> bool:
        """Start it, warm if possible. Returns whether this is done; otherwise it must be called again.

        Raises `OSError` if the program cannot be started.
        """
        if self._fork is None and warm_start is not None:
            self._fork = warm_start.fork(self.directory, environment)
        if self._fork is not None and self._fork.refusal is None:
            if self._fork.pid is not None:
                self._leader = ForkedLeader(self._fork, self.directory, self.oom_kills)
                return True
            if not self._fork.is_lost or not self._end_lost_fork():
                return False
        if self._fork is not None:
            self._log(f"starts cold ({self._fork.refusal or 'the fork server did not answer'})")
        self._leader = StartedLeader(command, self.directory, environment, self.oom_kills)
        return True

    def _end_lost_fork(self) -> bool:
        """Kill the process that a fork server may have forked before it was killed; returns whether none is left."""
        left = self._alive() or self.processes.lock_holders()
        processes.send(left, signal.SIGKILL)
        return not left and processes.is_unlocked(self.directory)

    def adopt(self) -> None:
        """Adopt the tree and the stop request of an earlier process of the worker."""
        self._leader = AdoptedLeader(self.processes)
        self.oom_kills = self._leader.oom_kills or self.oom_kills
        try:
            file = self.directory / STOP_FILE
            action = StopFile.model_validate_json(file.read_bytes()).action
            # The limits count from the request, not from this restart. The clock may have been set since, so the age is
            # at most the grace period: a run that saves always has the usual time between SIGTERM and SIGKILL.
            age_seconds = min(max(0.0, time.time() - file.stat().st_mtime), self._grace_seconds)
            self._request = _StopRequest(action, time.monotonic() - age_seconds)
        except (FileNotFoundError, ValidationError):
            return  # no request, or one of another version; the server repeats its requests

    @property
    def was_started(self) -> bool:
        """Whether this or an earlier process of the worker started it."""
        return isinstance(self._leader, StartedLeader | ForkedLeader) or (self.directory / LOG_FILE).exists()

    @property
    def was_adopted(self) -> bool:
        """Whether an earlier process of the worker started it."""
        return isinstance(self._leader, AdoptedLeader)

    @property
    def stop_action(self) -> StopAction | None:
        """The action of the most urgent stop request so far."""
        return None if self._request is None else self._request.action

    @property
    def exit_status(self) -> int | None:
        """The exit status of the first process, negative for a signal; ``None`` if unknown."""
        return None if self._leader is None else self._leader.exit_status

    def record_contact(self, at: float) -> None:
        """Record the last contact with the server, for the run (`time.monotonic`, the same in all processes)."""
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
        """Request the run to end. A more urgent request replaces an earlier one; repeating one has no effect.

        ``grace_only``: the worker itself must end, so a long step or save gets no more than the grace period.
        """
        self._grace_only = self._grace_only or grace_only
        if self._request is not None and STOP_ACTIONS.index(action) <= STOP_ACTIONS.index(self._request.action):
            return
        self._request = _StopRequest(action, time.monotonic())
        self._sent_sigterm = False
        if not self.directory.is_dir():
            return  # still being prepared; it won't be started
        try:
            write_atomically(self.directory / STOP_FILE, StopFile(action=action).model_dump_json().encode())
        except OSError as error:
            self._log(f"gets SIGTERM, because its stop file could not be written ({error})")
            processes.send(self._alive(), signal.SIGTERM)

    def kill(self) -> None:
        """Kill every process of the attempt; `is_gone` repeats this until they are gone."""
        if not self._is_killed:
            self._is_killed = True
            self._signal_all(signal.SIGKILL)

    def is_gone(self, *, has_ended: bool, can_save: bool, needs_seconds: float = 0.0) -> bool:
        """Take one step towards the end and return whether the tree is gone; never blocks.

        ``has_ended`` means that the journal has its last line, so the processes should exit. ``can_save`` means that
        the run has completed a step, so stopping it may take the time of a save. ``needs_seconds`` is the time
        that its current step or save may take beyond the grace period, unless ``grace_only`` was requested.
        """
        if self._gone:
            return True
        now = time.monotonic()
        if self._gpu_memory.is_count_due(now):
            self._alive()
        if self._leader is not None and self._leader.is_alive(now):
            limit = self._limit(now, has_ended, can_save, 0.0 if self._grace_only else needs_seconds)
            self._enforce(limit, now, is_loading=self._request is not None and not can_save)
            return False
        if now < self._next_look:
            return False
        self._next_look = now + LOOK_SECONDS
        left = self._alive()
        if not left and not processes.is_unlocked(self.directory):
            left = self.processes.lock_holders()
        if left:
            self._end_remaining(left, now)
            return False
        self._gone = processes.is_unlocked(self.directory) and not self._holds_memory(now)
        return self._gone

    def _limit(self, now: float, has_ended: bool, can_save: bool, needs_seconds: float) -> float | None:
        """When the first process, which is alive, must have exited; ``None`` if it may continue."""
        if self._request is not None:
            saves = can_save and self._request.action != "cancel"
            grace = self._grace_seconds
            return self._request.since + (grace + needs_seconds if saves else min(CANCEL_SECONDS, grace))
        if has_ended:
            self._ended_at = self._ended_at or now
            return self._ended_at + self._grace_seconds
        return None

    def _enforce(self, limit: float | None, now: float, *, is_loading: bool) -> None:
        """Send SIGTERM at ``limit``, and SIGKILL some time later.

        A run that is loading doesn't check for a stop file yet, so it gets SIGTERM immediately.
        """
        if now < self._next_signal:
            return
        if self._is_killed:
            self._signal_all(signal.SIGKILL)
            return
        if limit is None or (now < limit and (self._sent_sigterm or not is_loading)):
            return
        kills_at_limit = is_loading and self.stop_action == "cancel"
        if not self._sent_sigterm:
            self._sent_sigterm = True
            if not is_loading:
                self._log("did not end in time and gets SIGTERM")
            self._signal_all(signal.SIGTERM)
        elif now >= limit + (0.0 if kills_at_limit else min(KILL_SECONDS, self._grace_seconds)):
            self._log("did not end after SIGTERM and is killed")
            self._signal_all(signal.SIGKILL)

    def _alive(self) -> list[psutil.Process]:
        alive = self.processes.alive()
        self._gpu_memory.count(alive)
        return alive

    def _signal_all(self, number: signal.Signals) -> None:
        self._next_signal = time.monotonic() + SIGNAL_SECONDS
        processes.send(self._alive(), number)

    def _end_remaining(self, left: Sequence[psutil.Process], now: float) -> None:
        """End the processes that outlived the first one."""
        if self._left_since is None:
            self._left_since = now
            self._log(f"left {len(left)} process(es) behind, which are ended")
            processes.send(left, signal.SIGTERM)
        elif now - self._left_since >= min(KILL_SECONDS, self._grace_seconds):
            processes.send(left, signal.SIGKILL)

    def _holds_memory(self, now: float) -> bool:
        holders = self._gpu_memory.holders(now)
        if holders and self._gpu_memory.has_timed_out(now):
            self._log(f"is gone, but the driver reports that processes {sorted(holders)} hold memory on its GPUs")
            return False
        return bool(holders)

    def _log(self, event: str) -> None:
        """Log a sentence about this attempt; ``event`` is its predicate."""
        logger.warning(
            "Attempt %d of %s %s.",
            self.attempt,
            self.job_id,
            event,
            extra={"action": "end_run", "job_id": self.job_id, "attempt": self.attempt},
        )


class _GpuMemory:
    """The GPU memory of a tree, which the driver reports as used for a while after the processes have exited."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._devices = devices
        self._process_ids: set[int] = set()  # of all processes of the tree that were seen
        self._next_count = 0.0
        self._holding_since: float | None = None

    def is_count_due(self, now: float) -> bool:
        """Whether the tree's processes should be recorded again, because some may be short-lived."""
        if not self._devices or now < self._next_count:
            return False
        self._next_count = now + COUNT_SECONDS
        return True

    def count(self, alive: Iterable[psutil.Process]) -> None:
        self._process_ids.update(process.pid for process in alive)

    def holders(self, now: float) -> set[int]:
        """The ids of the tree's processes that hold memory according to the driver."""
        holder_ids = self._process_ids & memory_holders(self._devices) if self._devices else set[int]()
        if holder_ids:
            self._holding_since = self._holding_since or now
        return holder_ids

    def has_timed_out(self, now: float) -> bool:
        """Whether memory has been held for so long that the driver's report is ignored."""
        return self._holding_since is not None and now - self._holding_since >= DRIVER_SECONDS
