"""Finds and kills the processes of one attempt, wherever they went.

Every process of a run carries ``ZETA_JOB_ID`` and ``ZETA_ATTEMPT`` in its environment (a process group is not enough:
launchers give each rank a session of its own) and holds ``RUN_DIR/lock`` shared. What this does not find: a process
that was started with a clean environment and does not have the lock file open. A process's number may be given to
another one at any time, so signals go through psutil, which compares the start times.
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import psutil

from zeta_core.contract.layout import LOCK_FILE, MARK_ATTEMPT, MARK_JOB


def marked(job_id: str, attempt: int) -> list[psutil.Process]:
    """The living processes with the attempt's mark (a zombie is dead)."""
    return [found for found, number in _of_job(job_id) if number == attempt and _is_alive(found)]


def earlier(job_id: str, attempt: int) -> list[psutil.Process]:
    """The living processes of the job's attempts before ``attempt``."""
    return [found for found, number in _of_job(job_id) if number < attempt and _is_alive(found)]


def working_in(run_directory: Path) -> list[psutil.Process]:
    """The living processes with the mark of the attempt that has this run directory (``.../JOB/attempt-N``)."""
    job_id, number = run_directory.parent.name, run_directory.name.removeprefix("attempt-")
    return marked(job_id, int(number)) if number.isdigit() else []


def holders(run_directory: Path) -> list[psutil.Process]:
    """The living processes that have the run's lock file open, this one excepted."""
    lock = os.path.realpath(run_directory / LOCK_FILE)
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(file.path == lock for file in process.open_files()):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return [process for process in found if _is_alive(process)]


def send(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.Error:
            continue  # it ended meanwhile


def share_lock(run_directory: Path) -> int:
    """Open and share the run's lock; the descriptor is for the first process to inherit and to be closed here."""
    descriptor = os.open(run_directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def is_unlocked(run_directory: Path) -> bool:
    """Whether nobody holds the run's lock any more."""
    descriptor = os.open(run_directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)  # gives the lock back


def _of_job(job_id: str) -> list[tuple[psutil.Process, int]]:
    """The processes with the job's mark, each with its attempt."""
    found: list[tuple[psutil.Process, int]] = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue  # it ended meanwhile, or is another user's
        attempt = environment.get(MARK_ATTEMPT, "")
        if environment.get(MARK_JOB) == job_id and attempt.isdigit():
            found.append((process, int(attempt)))
    return found


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
