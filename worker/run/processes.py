"""Finds and signals the processes of one attempt, and never those of another home.

Every process of a run carries ``ZETA_JOB_ID``, ``ZETA_ATTEMPT`` and ``ZETA_RUN`` in its environment (a process group is
not enough: launchers give each rank a session of its own) and holds ``RUN_DIR/lock`` shared. ``ZETA_RUN`` is the
identity of that lock file, so a copied home (a restored backup, a clone, a container in the same PID namespace) never
recognizes the processes of the original as its own, and a renamed home does. A process without ``ZETA_RUN`` was started
by an older worker; it belongs to the run directory that it works in or whose lock file it has open.

A process that was started with a clean environment and does not have the lock file open is not found. A process id may
be reused at any time, so signals go through psutil, which compares the start times.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from zeta_core.contract.wire.run_directory import ATTEMPT_VARIABLE, JOB_VARIABLE, LOCK_FILE, RUN_VARIABLE
from zeta_core.system.file_identity import FileIdentity

_RECORD_BYTES = 200

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunProcesses:
    """The processes of the attempt with this run directory."""

    directory: Path
    job_id: str
    attempt: int

    @classmethod
    def from_directory(cls, run_directory: Path) -> RunProcesses | None:
        """The processes of ``.../JOB/attempt-N``; ``None`` if the directory has another name."""
        number = run_directory.name.removeprefix("attempt-")
        return cls(run_directory, run_directory.parent.name, int(number)) if number.isdecimal() else None

    def alive(self) -> list[psutil.Process]:
        """The living processes with the attempt's mark (a zombie is dead)."""
        return [
            found.process
            for found in _marked_processes(self.job_id)
            if found.attempt == self.attempt and found.belongs_to(self.directory) and is_alive(found.process)
        ]

    def earlier_attempts(self, home: Path) -> list[psutil.Process]:
        """The living processes of the job's earlier attempts, of any worker of this home."""
        return [
            found.process
            for found in _marked_processes(self.job_id)
            if found.attempt < self.attempt and found.is_in(home) and is_alive(found.process)
        ]

    def in_other_homes(self, home: Path) -> list[str]:
        """The living processes that have the job's mark and belong to another home, described for a log message."""
        return [
            f"process {found.process.pid} (attempt {found.attempt}, in {_working_directory(found.process)})"
            for found in _marked_processes(self.job_id)
            if not found.is_in(home) and is_alive(found.process)
        ]

    def kill_earlier_attempts(self, home: Path) -> bool:
        """Kill the job's earlier attempts in this home, such as one of a lost worker; returns whether any is alive.

        Processes of other homes are only logged: they may belong to another service, if this database is a copy.
        """
        if earlier := self.earlier_attempts(home):
            logger.warning("Attempt %d of %s is waiting for an earlier attempt to end.", self.attempt, self.job_id)
            send(earlier, signal.SIGKILL)
            return True
        if others := self.in_other_homes(home):
            logger.warning(
                "%s is also running in another home on this machine, which this worker ignores: %s.",
                self.job_id,
                "; ".join(others),
                extra={"action": "other_home", "job_id": self.job_id, "attempt": self.attempt},
            )
        return False

    def lock_holders(self) -> list[psutil.Process]:
        """The living processes that have the run's lock file open, except this process."""
        lock = self.directory / LOCK_FILE
        return [
            process
            for process in psutil.process_iter()
            if process.pid != os.getpid() and _has_open(process, lock) and is_alive(process)
        ]


def send(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.Error:
            continue  # it has just exited


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


# --- The lock of a run, which identifies its run directory ------------------------------------------------------------


def share_lock(run_directory: Path) -> int:
    """Open and share the run's lock; the first process inherits the descriptor, and the caller closes it.

    The lock file records its own identity, so that a copy of the directory is recognized.
    """
    descriptor = os.open(run_directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{FileIdentity.of(descriptor)}\n".encode(), 0)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def run_mark(run_directory: Path) -> str:
    """The value of ``ZETA_RUN`` for the processes of this run directory."""
    return FileIdentity.of(run_directory / LOCK_FILE).key


def is_unlocked(run_directory: Path) -> bool:
    """Whether no process holds the run's lock."""
    descriptor = os.open(run_directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)  # releases the lock


def is_locked(run_directory: Path) -> bool:
    """Whether a process holds the run's lock."""
    return (run_directory / LOCK_FILE).exists() and not is_unlocked(run_directory)


def is_copied(run_directory: Path) -> bool | None:
    """Whether this run directory is a copy of the one that its run was started in.

    ``None`` if its lock file doesn't record this: nothing was started there yet, or an older worker started it.
    """
    try:
        descriptor = os.open(run_directory / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        recorded = FileIdentity.parse(os.pread(descriptor, _RECORD_BYTES, 0).decode("ascii", "replace"))
        if recorded is None:
            return None
        # The processes of a copied run hold the lock of the original. If this lock is held, the run is not a copy,
        # although it may have changed the record.
        return not recorded.is_same_file(FileIdentity.of(descriptor)) and not is_locked(run_directory)
    finally:
        os.close(descriptor)


# --- Processes by their marks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Marked:
    process: psutil.Process
    attempt: int
    environment: Mapping[str, str]

    def belongs_to(self, run_directory: Path) -> bool:
        lock = run_directory / LOCK_FILE
        if mark := self.environment.get(RUN_VARIABLE):
            try:
                return mark == FileIdentity.of(lock).key
            except FileNotFoundError:
                return False
        return _works_in(self.process, run_directory) or _has_open(self.process, lock)

    def is_in(self, home: Path) -> bool:
        """Whether it belongs to the run directory that any worker of the home has for this attempt."""
        name = f"attempt-{self.attempt}"
        return any(map(self.belongs_to, home.glob(f"workers/*/runs/{self.environment[JOB_VARIABLE]}/{name}")))


def _marked_processes(job_id: str) -> Iterator[_Marked]:
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue  # it has just exited, or is another user's
        attempt = environment.get(ATTEMPT_VARIABLE, "")
        if environment.get(JOB_VARIABLE) == job_id and attempt.isdecimal():
            yield _Marked(process, int(attempt), environment)


def _works_in(process: psutil.Process, directory: Path) -> bool:
    """Compares by identity: in another mount namespace, the same path may be another directory."""
    try:
        working_directory = f"/proc/{process.pid}/cwd" if sys.platform == "linux" else process.cwd()
        return FileIdentity.of(working_directory) == FileIdentity.of(directory)
    except (psutil.Error, OSError):
        return False


def _has_open(process: psutil.Process, file: Path) -> bool:
    """Compares by identity, as `_works_in` does, but only files with that name."""
    try:
        identity = FileIdentity.of(file)
        if sys.platform != "linux":
            return any(opened.path == os.path.realpath(file) for opened in process.open_files())
        descriptors = list(Path(f"/proc/{process.pid}/fd").iterdir())
    except (psutil.Error, OSError):
        return False
    return any(_names(descriptor, file.name) and _is(descriptor, identity) for descriptor in descriptors)


def _names(descriptor: Path, name: str) -> bool:
    try:
        return os.readlink(descriptor).endswith(f"/{name}")
    except OSError:
        return False  # closed in the meantime


def _is(descriptor: Path, identity: FileIdentity) -> bool:
    try:
        return FileIdentity.of(descriptor) == identity
    except OSError:
        return False


def _working_directory(process: psutil.Process) -> str:
    try:
        return process.cwd()
    except psutil.Error:
        return "an unknown directory"
