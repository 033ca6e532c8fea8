"""The worker's end of a fork server (`zeta_core.process.fork_server`): one process, and the runs that it forks.

Nothing here blocks. A fork server that doesn't answer is killed, and may have forked a run just before: then
`Fork.is_lost` is set, and the processes of its run must be ended before it is started again. Other runs survive.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import ValidationError

from worker.run.launch import make_preferred_when_memory_runs_out
from worker.run.processes import run_mark, share_lock
from zeta_core.contract.wire.fork_server import (
    FILLER,
    FORK_SERVER_ARGUMENT,
    FORK_SERVER_MESSAGE,
    FORK_SERVER_VARIABLE,
    MARK_BYTES,
    MAX_PACKET_BYTES,
    Exited,
    Forked,
    ForkRequest,
    ForkServerReady,
    Refused,
    Stale,
)
from zeta_core.contract.wire.run_directory import LOG_FILE, RUN_VARIABLE
from zeta_core.system.file_identity import FileIdentity

ANSWER_SECONDS = 20.0  # to a request; forking takes milliseconds
READY_SECONDS = 300.0  # for the imports, on a busy machine
_LIMITS = tuple(sorted({value for name, value in vars(resource).items() if name.startswith("RLIMIT_")}))


@dataclass
class Fork:
    """A run that was requested; the fork server's answers are filled in as they arrive."""

    requested_at: float  # monotonic
    pid: int | None = None
    refusal: str | None = None  # why nothing was started
    is_lost: bool = False  # there is no answer, so it may have been started
    exit_status: int | None = None
    may_report_exit: bool = True  # false once the fork server is gone


class ForkServerProcess:
    """A running fork server. After `is_over`, it is gone, and all its forks have their final values."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path, mark: str) -> None:
        """Start it in ``folder``; ``mark`` identifies its worker. Raises `OSError`."""
        filled = mark.ljust(MARK_BYTES, FILLER)
        self.environment = dict(environment)
        self.memory_bytes: int | None = None  # once it is ready
        self.stale_reason: str | None = None  # why it no longer forks
        self.is_over = False
        self._forks: list[Fork] = []  # those without their final values
        self._unanswered: deque[Fork] = deque()
        self._started_at = time.monotonic()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        try:
            self._process = subprocess.Popen(
                [*command, FORK_SERVER_ARGUMENT, filled],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                cwd=folder,
                env={**environment, FORK_SERVER_VARIABLE: filled},  # the last variable, followed by nothing
                start_new_session=True,
            )
        except OSError:
            self._socket.close()
            raise
        finally:
            theirs.close()
        make_preferred_when_memory_runs_out(self._process.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def can_fork(self) -> bool:
        return self.memory_bytes is not None and self.stale_reason is None and not self.is_over

    @property
    def has_runs(self) -> bool:
        return bool(self._forks)

    @property
    def exit_status(self) -> int | None:
        return self._process.returncode

    def fork(self, run_directory: Path, environment: Mapping[str, str]) -> Fork | None:
        """Request a run; ``None`` if the request can't be sent. Raises `OSError` if the directory is unusable."""
        umask = _umask()
        if umask is None:
            return None
        lock = share_lock(run_directory)
        try:
            request = ForkRequest(
                run_directory=str(run_directory),
                environment={**environment, RUN_VARIABLE: run_mark(run_directory)},
                resource_limits={number: resource.getrlimit(number) for number in _LIMITS},
                umask=umask,
                niceness=os.getpriority(os.PRIO_PROCESS, 0),
                cpus=sorted(os.sched_getaffinity(0)),
            )
            packet = request.model_dump_json().encode()
            if len(packet) > MAX_PACKET_BYTES:
                return None
            with (run_directory / LOG_FILE).open("ab") as log:
                try:
                    socket.send_fds(self._socket, [packet], [lock, log.fileno()])
                except OSError:
                    return None  # it is gone, or so slow that its queue is full
        finally:
            os.close(lock)  # a descriptor in the socket's queue keeps the lock
        fork = Fork(time.monotonic())
        self._forks.append(fork)
        self._unanswered.append(fork)
        return fork

    def step(self) -> None:
        """Receive messages, and end a fork server that doesn't answer."""
        if self.is_over:
            return
        while (message := self._receive()) is not None:
            match message:
                case ForkServerReady(memory_bytes=size):
                    self.memory_bytes = size
                case Forked(pid=pid):
                    self._unanswered.popleft().pid = pid
                case Refused(reason=reason, is_stale=is_stale):
                    refused = self._unanswered.popleft()
                    refused.refusal = reason
                    self._forks.remove(refused)
                    self.stale_reason = reason if is_stale else self.stale_reason
                case Stale(reason=reason):
                    self.stale_reason = reason
                case Exited(pid=pid, status=status):
                    for fork in [fork for fork in self._forks if fork.pid == pid]:
                        fork.exit_status = status
                        self._forks.remove(fork)
        now = time.monotonic()
        is_hanging = bool(self._unanswered) and now - self._unanswered[0].requested_at > ANSWER_SECONDS
        if is_hanging or (self.memory_bytes is None and now - self._started_at > READY_SECONDS):
            self.kill()
        if self._process.poll() is not None:
            self._finish()

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Let it exit by itself, without waiting."""
        self._socket.close()
        self._abandon_forks()

    def _receive(self) -> ForkServerReady | Forked | Refused | Stale | Exited | None:
        try:
            packet = self._socket.recv(MAX_PACKET_BYTES)
        except OSError:
            return None  # nothing yet, or it is gone
        if not packet:
            return None
        try:
            return FORK_SERVER_MESSAGE.validate_json(packet)
        except ValidationError:
            self.kill()  # code of another version
            return None

    def _finish(self) -> None:
        self.is_over = True
        self._socket.close()
        self._abandon_forks()

    def _abandon_forks(self) -> None:
        for fork in self._forks:
            fork.is_lost = fork.pid is None
            fork.may_report_exit = False
        self._forks.clear()
        self._unanswered.clear()


def mark_of(worker_lock: Path) -> str:
    """The mark of the fork servers of the worker with this lock file."""
    return FileIdentity.of(worker_lock).key


def kill_left_fork_servers(mark: str) -> None:
    """Kill the fork servers of an earlier process of this worker, which exit by themselves unless they are stopped."""
    for process in psutil.process_iter():
        try:
            found = process.environ().get(FORK_SERVER_VARIABLE, "")
            if found.rstrip(FILLER) == mark:
                process.send_signal(signal.SIGKILL)
        except (psutil.Error, OSError):
            continue  # it has just exited, or is another user's


def _umask() -> int | None:
    """The umask of this process, which other threads may be using; ``None`` if the kernel doesn't show it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1], 8) for line in lines if line.startswith("Umask:")), None)
