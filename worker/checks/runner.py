"""Answers the server's check requests for specs, one at a time and with limits, while jobs run.

Guaranteed: a check has the environment of a run (no secrets of the service) and no GPU, and every failure becomes
a result. See `CheckProcess` for the lifetime of its process.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from worker.checks.process import CheckFailed, CheckProcess
from worker.machine.devices import Slot, count_cores, uses_gpus
from worker.run.launch import own_environment, run_environment
from worker.settings import WorkerSettings
from worker.threads import log_failure
from zeta_core.contract.job.check import CheckAnswer
from zeta_core.contract.wire.messages import CheckRequest, CheckResult
from zeta_core.contract.wire.run_directory import CACHE_DIRECTORY, RUN_FILE, RunFile
from zeta_core.system.outage import error_text

MAX_WAITING = 4  # further requests are rejected immediately, because they would time out
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
    ) -> None:
        self._settings = settings
        self._gpu = next((slot for slot in slots if slot.kind == "cuda"), None)
        self._send = send
        environment = run_environment(
            own_environment(),
            job_id=NAME,
            attempt=0,
            threads=max(1, count_cores() // 2),
            devices=[],
            hub=settings.hub != "off",
            job_env=(),
        )
        self._process = CheckProcess(
            command, environment, Path(tempfile.gettempdir()), memory_bytes=settings.check_memory_bytes
        )
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="check")
        self._waiting: set[str] = set()
        self._stopping = False

    def take(self, request: CheckRequest) -> None:
        """Queue the check, unless it is queued already."""
        if request.check_id in self._waiting:
            return
        if len(self._waiting) >= MAX_WAITING:
            self._send(self._failed(request, f"The worker already has {len(self._waiting)} checks queued."))
            return
        self._waiting.add(request.check_id)
        log_failure(self._executor.submit(self._check, request), "The result of a check could not be sent")

    def stop(self) -> None:
        """Accept no more requests; a running check ends within its limit, and its process after it."""
        self._stopping = True
        log_failure(self._executor.submit(self._process.end), "The check process could not be ended")
        self._executor.shutdown(wait=False)

    def _check(self, request: CheckRequest) -> None:
        if self._stopping:
            return
        try:
            result = self._answer(request)
        except BaseException as error:
            logger.warning(
                "A check could not be run: %s.",
                error_text(error),
                exc_info=None if isinstance(error, OSError) else error,
                extra={"action": "check"},
            )
            with suppress(Exception):
                self._process.end()  # it may still answer this request, and must not mix it up with the next
            result = self._failed(request, f"The check could not be run: {error_text(error)}.")
        finally:
            self._waiting.discard(request.check_id)
        self._send(result)

    def _answer(self, request: CheckRequest) -> CheckResult:
        settings = self._settings
        gpu = self._gpu if uses_gpus(request.spec) else None
        with tempfile.TemporaryDirectory(prefix="zeta-check-") as scratch:
            run_file = RunFile(
                job_id=NAME,
                attempt=0,
                spec=request.spec,
                resolved_spec=request.resolved_spec,
                output_dir=scratch,
                cache_dir=str(settings.root / CACHE_DIRECTORY),
                artifacts_root=str(settings.artifacts),
                data_root=str(settings.data_root) if settings.data_root else None,
                hub=settings.hub != "off",
                processes=request.processes,
                device="cpu" if gpu is None else "cuda",
                supports_bf16=gpu is not None and gpu.supports_bf16,
                rows_seconds=ROWS_SHARE * request.limit_seconds,
            )
            file = Path(scratch, RUN_FILE)
            file.write_text(run_file.model_dump_json())
            try:
                out = self._process.check(file, limit_seconds=request.limit_seconds)
                answer = CheckAnswer.model_validate_json(out)
            except (CheckFailed, ValidationError) as error:
                logger.warning("A check failed: %s", error)
                reason = str(error) if isinstance(error, CheckFailed) else "The check returned an invalid result."
                return self._failed(request, reason)
        return CheckResult(check_id=request.check_id, worker=settings.worker_name, answer=answer)

    def _failed(self, request: CheckRequest, reason: str) -> CheckResult:
        return CheckResult(check_id=request.check_id, worker=self._settings.worker_name, failure=reason)
