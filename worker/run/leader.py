"""The first process of a run, either started by this worker process or adopted. The run ends when it exits."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from pydantic import ValidationError

from worker.run import processes
from worker.run.fork_server import Fork
from worker.run.launch import start_run
from worker.run.processes import RunProcesses
from zeta_core.contract.wire.run_directory import PROCESS_FILE, ProcessFile
from zeta_core.system.oom_kills import OomKills

REPORT_SECONDS = 2.0  # from the death of a forked process to the report of its exit status
LOOK_SECONDS = 0.5  # between two scans of all processes; a scan takes milliseconds


class StartedLeader:
    """A child of this process."""

    def __init__(
        self, command: Sequence[str], directory: Path, environment: Mapping[str, str], oom_kills: OomKills
    ) -> None:
        """Start it, and record its id and ``oom_kills`` for a restarted worker. Raises `OSError`."""
        self._process = start_run(command, directory, environment)
        _record(self._process.pid, directory, oom_kills)

    def is_alive(self, now: float) -> bool:
        return self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        return self._process.returncode


class ForkedLeader:
    """A child of this process's fork server, which reports its exit status.

    The status is ``None`` if the fork server was killed or doesn't report it in time.
    """

    def __init__(self, fork: Fork, directory: Path, oom_kills: OomKills) -> None:
        """``fork`` has a process id, which is recorded with ``oom_kills`` for a restarted worker."""
        assert fork.pid is not None
        self._fork = fork
        self._found_dead_at: float | None = None
        try:
            self._process = psutil.Process(fork.pid)
        except psutil.NoSuchProcess:
            self._process = None  # it has exited already
        _record(fork.pid, directory, oom_kills)

    def is_alive(self, now: float) -> bool:
        if self._fork.exit_status is not None:
            return False
        if self._process is not None and processes.is_alive(self._process):
            return True
        self._found_dead_at = self._found_dead_at or now
        return self._fork.may_report_exit and now - self._found_dead_at < REPORT_SECONDS

    @property
    def exit_status(self) -> int | None:
        return self._fork.exit_status


class AdoptedLeader:
    """The first process of a tree that an earlier process of the worker started. Its exit status is unknown.

    If its process id is unknown too, any process of the tree may be the first one, so none is ended as a leftover.
    """

    exit_status = None

    def __init__(self, tree: RunProcesses) -> None:
        try:
            recorded = ProcessFile.model_validate_json((tree.directory / PROCESS_FILE).read_bytes())
        except (FileNotFoundError, ValidationError):
            recorded = None  # started by an older worker, or the worker was killed at that moment
        self.oom_kills = None if recorded is None else OomKills(recorded.group_oom_kills, recorded.machine_oom_kills)
        self._tree = tree
        self._is_known = recorded is not None
        self._process = next((process for process in tree.alive() if recorded and process.pid == recorded.pid), None)
        self._any_alive = True
        self._next_look = 0.0

    def is_alive(self, now: float) -> bool:
        if self._is_known:
            return self._process is not None and processes.is_alive(self._process)
        if self._any_alive and now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._any_alive = bool(self._tree.alive())
        return self._any_alive


def _record(pid: int, directory: Path, oom_kills: OomKills) -> None:
    """Record the first process of a run for a restarted worker."""
    record = ProcessFile(pid=pid, group_oom_kills=oom_kills.group, machine_oom_kills=oom_kills.machine)
    with contextlib.suppress(OSError):  # a full disk must not end the run that was just started
        (directory / PROCESS_FILE).write_text(record.model_dump_json())
