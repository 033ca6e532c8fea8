"""Answers the server's check requests for specs, with limits and fairly between projects, while jobs run.

Up to `NUM_PROCESSES` checks run at once, one of each project (`WaitingChecks`). A check that takes so long that nobody
waits for its result any more is ended when a check of another project waits.

Guaranteed: a check has the environment of a run (no secrets of the service) and no GPU, and every failure becomes
a result. See `CheckProcess` for the lifetime of its process.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Lock

from pydantic import ValidationError

from worker.checks.process import CheckFailed, CheckProcess
from worker.checks.waiting import WaitingChecks
from worker.machine.devices import Slot, count_cores, uses_gpus
from worker.run.launch import own_environment, run_environment
from worker.run.sandbox import Sandboxes, SandboxInputs
from worker.settings import WorkerSettings
from worker.threads import log_failure
from zeta_core.contract.access import HubAccess
from zeta_core.contract.job.check import CheckAnswer
from zeta_core.contract.wire.messages import CheckRequest, CheckResult
from zeta_core.contract.wire.run_directory import RUN_FILE, RunFile, project_cache
from zeta_core.system.artifact_store import ArtifactStore
from zeta_core.system.outage import error_text

NUM_PROCESSES = 2  # the second one starts when it may be needed, and ends when no check of several projects is left
SLOW_SECONDS = 1.0  # a check that takes longer starts the second process, before another project needs it
SEVERAL_PROJECTS_SECONDS = 600.0  # if several projects sent checks in this time, the second process is kept
WAITED_SHARE = 1 / 4  # of the time limit: after this time, nobody waits for the result
ROWS_SHARE = 1 / 6  # of the time limit: for reading rows, because the caller waits for a quarter of the limit
NAME = "check"  # used instead of a job id in the process's marks

logger = logging.getLogger(__name__)


class SpecCheckRunner:
    """Runs the spec checks that the server requests. ``send`` sends a result to the server; a thread calls it."""

    def __init__(
        self,
        settings: WorkerSettings,
        command: Sequence[str],
        slots: Sequence[Slot],
        send: Callable[[CheckResult], None],
        store: ArtifactStore,
        sandboxes: Sandboxes | None = None,
    ) -> None:
        self._settings = settings
        self._gpu = next((slot for slot in slots if slot.kind == "cuda"), None)
        self._send = send
        self._store = store
        self._sandboxes = sandboxes
        environment = self._environment(HubAccess.OPERATOR_TOKEN)
        folder = settings.root  # private; other users of the machine can create files in /tmp
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock()  # for the unused processes
        self._unused = [
            CheckProcess(command, environment, folder, memory_bytes=settings.check_memory_bytes)
            for _ in range(NUM_PROCESSES)
        ]
        self._executor = ThreadPoolExecutor(max_workers=NUM_PROCESSES, thread_name_prefix="check")
        self._waiting = WaitingChecks()
        self._asked_at: dict[str, float] = {}  # monotonic, by project
        self._stopping = False

    def take(self, request: CheckRequest) -> None:
        """Queue the check, unless it is queued already."""
        now = time.monotonic()
        recent = {name: at for name, at in self._asked_at.items() if now - at < SEVERAL_PROJECTS_SECONDS}
        self._asked_at = {**recent, request.project: now}
        if (reason := self._waiting.add(request)) is not None:
            self._send(self._failed(request, reason))
            return
        log_failure(self._executor.submit(self._work), "The result of a check could not be sent")

    def stop(self) -> None:
        """Accept no more requests, and end the checks and their processes soon."""
        self._stopping = True
        log_failure(self._executor.submit(self._end_unused), "The check process could not be ended")
        self._executor.shutdown(wait=False)

    def _environment(self, hub: HubAccess) -> dict[str, str]:
        """The environment of checks for projects with this access to the Hub."""
        return run_environment(
            own_environment(),
            job_id=NAME,
            attempt=0,
            threads=max(1, count_cores() // 2),
            devices=[],
            hub=self._settings.hub_access(hub),
            job_env=(),
        )

    def _work(self) -> None:
        """Run checks until none may begin."""
        if self._waiting.needs_another_process:
            self._prepare_another()
        while not self._stopping and (request := self._waiting.begin()) is not None:
            with self._lock:
                process = self._unused.pop()
            try:
                self._check(request, process)
            finally:
                with self._lock:  # before the next check of the project may begin, which then needs no other process
                    self._unused.append(process)
                self._waiting.end(request)
                if self._stopping:
                    self._end_unused()
                elif self._waiting.is_empty and len(self._asked_at) < NUM_PROCESSES:
                    self._end_unused(keep=process)

    def _prepare_another(self) -> None:
        """Start another process while one is used, so that the check of another project need not wait for it."""
        with self._lock, suppress(OSError):  # the check itself will report it
            if self._unused and not self._stopping:
                self._unused[-1].prepare()

    def _end_unused(self, *, keep: CheckProcess | None = None) -> None:
        with self._lock:
            for process in self._unused:
                if process is not keep:
                    process.end()

    def _check(self, request: CheckRequest, process: CheckProcess) -> None:
        try:
            result = self._answer(request, process)
        except BaseException as error:
            logger.warning(
                "A check could not be run: %s.",
                error_text(error),
                exc_info=None if isinstance(error, OSError) else error,
                extra={"action": "check"},
            )
            with suppress(Exception):
                process.end()  # it may still answer this request, and must not mix it up with the next
            result = self._failed(request, f"The check could not be run: {error_text(error)}.")
        self._send(result)

    def _require_turn(self, request: CheckRequest, began: float) -> None:
        """Raise `CheckFailed` if the check must end: for checks of other projects, or because the worker stops."""
        seconds = time.monotonic() - began
        if self._stopping:
            raise CheckFailed("The worker is stopping; try again.")
        if seconds >= SLOW_SECONDS:
            self._prepare_another()
        if seconds >= WAITED_SHARE * request.limit_seconds and self._waiting.others_wait(request.project):
            raise CheckFailed(
                f"The check was ended after {seconds:.0f} s, because checks of other projects were waiting; try again."
            )

    def _answer(self, request: CheckRequest, process: CheckProcess) -> CheckResult:
        settings = self._settings
        gpu = self._gpu if uses_gpus(request.spec) else None
        process.use_environment(self._environment(request.hub))
        with tempfile.TemporaryDirectory(prefix="zeta-check-") as scratch:
            run_file = RunFile(
                job_id=NAME,
                attempt=0,
                spec=request.spec,
                resolved_spec=request.resolved_spec,
                output_dir=scratch,
                cache_dir=str(settings.root / project_cache(request.project)),
                artifacts_root=str(settings.artifacts),
                data_root=str(settings.data_root) if settings.data_root else None,
                hub=settings.hub_access(request.hub) != HubAccess.OFF,
                bases=request.bases,
                processes=request.processes,
                device="cpu" if gpu is None else "cuda",
                supports_bf16=gpu is not None and gpu.supports_bf16,
                rows_seconds=ROWS_SHARE * request.limit_seconds,
                shown=request.shown,
            )
            file = Path(scratch, RUN_FILE)
            file.write_text(run_file.model_dump_json())
            inputs = SandboxInputs.of_check(request, settings, self._store.local)
            if self._sandboxes is not None:
                hub = settings.hub_access(request.hub)
                self._sandboxes.prepare(file.parent, inputs=inputs, project=request.project, hub=hub, may_remove=True)
            try:
                on_wait = partial(self._require_turn, request, time.monotonic())
                out = process.check(file, limit_seconds=request.limit_seconds, on_wait=on_wait)
                answer = CheckAnswer.model_validate_json(out)
            except (CheckFailed, ValidationError) as error:
                logger.warning("A check failed: %s", error)
                reason = str(error) if isinstance(error, CheckFailed) else "The check returned an invalid result."
                return self._failed(request, reason)
        return CheckResult(check_id=request.check_id, worker=settings.worker_name, answer=answer)

    def _failed(self, request: CheckRequest, reason: str) -> CheckResult:
        return CheckResult(check_id=request.check_id, worker=self._settings.worker_name, failure=reason)
