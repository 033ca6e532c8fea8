"""Warm starts: keeps a fork server ready, so that runs start without importing their libraries.

A run is started cold instead, with a reason in the log, whenever the fork server is not ready, refuses, or was
started with other variables than the run gets. The fork server is started once the worker has been idle for a
moment, because importing takes seconds of two cores. It is replaced when its code has changed, and ended while the
machine runs out of memory. It has the niceness of the worker and the `oom_score_adj` of runs, which inherit both.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from worker.machine.devices import Slot, count_cores
from worker.run.fork_server import Fork, ForkServerProcess, kill_left_fork_servers, mark_of
from worker.run.launch import TRAINER_COMMAND, own_environment, run_environment
from worker.run.memory_watch import free_memory_bytes, in_gib
from worker.settings import WorkerSettings
from zeta_core.contract.access import HubAccess
from zeta_core.contract.wire.run_directory import ATTEMPT_VARIABLE, JOB_VARIABLE, RUN_VARIABLE

START_SECONDS = 2.0  # for which the worker must have been idle
LOOK_SECONDS = 1.0  # between two looks at the memory
MAX_MEMORY_BYTES = 2 * 2**30  # of a fork server; the libraries take less than half a gibibyte
FREE_SHARE = 0.1  # of the machine's memory: with less free memory, no fork server is started
RELEASE_SHARE = 0.05  # and with less than this, the present one is ended
PAUSE_SECONDS, MAX_PAUSE_SECONDS = 30.0, 3600.0  # before another try after a failure, twice as long each time
MARKS = (JOB_VARIABLE, ATTEMPT_VARIABLE, RUN_VARIABLE)  # differ between runs

logger = logging.getLogger(__name__)


class WarmStart:
    """``fork`` requests a run; `step` is called in every round of the supervising loop."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        *,
        worker_lock: Path,
        free_bytes: Callable[[], int] = free_memory_bytes,
    ) -> None:
        """``environment`` is that of a run on a CPU, whose marks are ignored."""
        self._command, self._folder = command, folder
        self._environment = _without_marks(environment)
        self._mark = mark_of(worker_lock)
        self._free_bytes = free_bytes
        self._total_bytes = int(psutil.virtual_memory().total)
        self._server: ForkServerProcess | None = None
        self._announced: ForkServerProcess | None = None
        self._retired: list[ForkServerProcess] = []  # they report the exits of their runs
        self._pause_seconds = PAUSE_SECONDS
        self._next_start = 0.0  # this and all following times are monotonic
        self._next_look = 0.0
        self._idle_since: float | None = None
        kill_left_fork_servers(self._mark)

    @classmethod
    def of_worker(cls, settings: WorkerSettings, slots: Sequence[Slot], command: Sequence[str]) -> WarmStart | None:
        """The worker's warm start; ``None`` if its runs all start cold.

        Only Linux shows the memory with the marks of a process. With a GPU, importing the libraries may use CUDA, which
        doesn't work after a fork. Another ``command`` is not known to have a fork server.
        """
        on_gpus = any(slot.kind == "cuda" for slot in slots)
        if not settings.warm_start or on_gpus or sys.platform != "linux" or tuple(command) != TRAINER_COMMAND:
            return None
        environment = run_environment(
            own_environment(),
            job_id="",
            attempt=0,
            threads=max(1, count_cores() // len(slots)),
            devices=[],
            hub=settings.hub_access(HubAccess.OPERATOR_TOKEN),
            job_env=settings.job_env,
        )
        return cls(command, environment, settings.root, worker_lock=settings.lock_file)

    @property
    def process_id(self) -> int | None:
        return None if self._server is None else self._server.pid

    @property
    def is_ready(self) -> bool:
        return self._server is not None and self._server.can_fork

    def fork(self, run_directory: Path, environment: Mapping[str, str]) -> Fork | None:
        """Request a run; ``None`` if it must be started cold. Raises `OSError` if the directory is unusable."""
        server, fork = self._server, None
        if server is None or not server.can_fork:
            reason = "the fork server is not ready"
        elif _without_marks(environment) != self._environment:
            reason = "its environment is not that of the fork server"
        else:
            fork = server.fork(run_directory, environment)
            reason = "the request can't be sent to the fork server"
        if fork is None:
            logger.info("The run in %s starts cold: %s.", run_directory, reason, extra={"action": "warm_start"})
        return fork

    def step(self, *, is_idle: bool) -> None:
        """Receive the fork server's messages; start, replace or end it. ``is_idle``: no training is being started."""
        now = time.monotonic()
        for server in (*self._retired, *((self._server,) if self._server else ())):
            server.step()
        self._close_unused()
        if self._server is not None:
            self._check(self._server, now)
        self._idle_since = (self._idle_since or now) if is_idle else None
        if self._server is None and self._idle_since is not None and now - self._idle_since >= START_SECONDS:
            self._start(now)

    def stop(self) -> None:
        """Let the fork servers exit; their runs continue."""
        for server in (*self._retired, *((self._server,) if self._server else ())):
            server.close()
        self._retired, self._server = [], None

    def _start(self, now: float) -> None:
        if now < max(self._next_start, self._next_look):
            return
        self._next_look = now + LOOK_SECONDS
        if self._free_bytes() < FREE_SHARE * self._total_bytes:
            return
        try:
            self._server = ForkServerProcess(self._command, self._environment, self._folder, self._mark)
        except OSError as error:
            self._fail(now, f"it can't be started ({error})")

    def _check(self, server: ForkServerProcess, now: float) -> None:
        """End or replace the fork server if necessary."""
        if server.is_over:
            self._server = None
            self._fail(now, f"it exited with status {server.exit_status}")
        elif server.stale_reason is not None:
            self._retire(server, f"{server.stale_reason}; it is replaced")
        elif server.memory_bytes is not None:
            if server.memory_bytes > MAX_MEMORY_BYTES:
                self._retire(server, f"it uses {in_gib(server.memory_bytes)} of memory")
                self._next_start = float("inf")
            elif server is not self._announced:
                self._announced = server
                logger.info("The fork server is ready; it uses %s of memory.", in_gib(server.memory_bytes))
            elif now >= self._next_look:
                self._next_look = now + LOOK_SECONDS
                self._pause_seconds = PAUSE_SECONDS
                if self._free_bytes() < RELEASE_SHARE * self._total_bytes:
                    self._retire(server, "the machine runs out of memory")

    def _retire(self, server: ForkServerProcess, reason: str) -> None:
        """Request nothing more from it. It is closed when its last run has exited."""
        logger.info("The fork server is no longer used: %s.", reason, extra={"action": "warm_start"})
        self._retired.append(server)
        self._server = None
        self._close_unused()

    def _close_unused(self) -> None:
        self._retired = [server for server in self._retired if not server.is_over]
        for server in self._retired:
            if not server.has_runs:
                server.close()  # it exits then

    def _fail(self, now: float, reason: str) -> None:
        logger.warning(
            "The fork server failed: %s. Runs start cold; the next try is in %.0f s.",
            reason,
            self._pause_seconds,
            extra={"action": "warm_start"},
        )
        self._next_start = now + self._pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, MAX_PAUSE_SECONDS)


def _without_marks(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in MARKS}
