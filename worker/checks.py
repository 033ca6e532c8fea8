"""Runs ``python -m zeta_core check`` for the server: one at a time, within a limit, beside the trainings.

Guaranteed: a check has the environment of a training (no secret of the service) and no GPU, it is killed with all that
it started when its time is over, and whatever happens to it becomes an answer. When a worker is killed, its check goes
on to its own end, which is seconds away.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pydantic import ValidationError

from worker.devices import count_cores
from worker.launch import own_environment, training_environment
from worker.settings import WorkerSettings
from zeta_core.contract.check import CheckAnswer
from zeta_core.contract.layout import CACHE_DIRECTORY, RunFile
from zeta_core.contract.messages import CheckRequest, CheckResult

MOST_WAITING = 4  # more are answered at once: their askers would not wait for them
NAME = "check"  # stands for a job's id in the marks of its process

logger = logging.getLogger(__name__)


class Checks:
    """``say`` sends a result to the server; it is called from a thread."""

    def __init__(self, settings: WorkerSettings, command: Sequence[str], say: Callable[[CheckResult], None]) -> None:
        self._settings = settings
        self._command = command
        self._say = say
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="check")
        self._waiting: set[str] = set()

    def take(self, request: CheckRequest) -> None:
        """Check it soon; one that waits already is not taken twice."""
        if request.check_id in self._waiting:
            return
        if len(self._waiting) >= MOST_WAITING:
            self._say(self._failed(request, f"The worker has {len(self._waiting)} checks to do already."))
            return
        self._waiting.add(request.check_id)
        self._executor.submit(self._check, request)

    def stop(self) -> None:
        """Take no more; a check under way ends within its limit."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _check(self, request: CheckRequest) -> None:
        try:
            self._say(self._answer(request))
        except OSError as error:
            self._say(self._failed(request, f"The check could not be run: {error}."))
        finally:
            self._waiting.discard(request.check_id)

    def _answer(self, request: CheckRequest) -> CheckResult:
        settings = self._settings
        with tempfile.TemporaryDirectory(prefix="zeta-check-") as scratch:
            order = RunFile(
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
            )
            environment = training_environment(
                own_environment(),
                job_id=NAME,
                attempt=0,
                threads=max(1, count_cores() // 2),
                devices=[],
                hub=order.hub,
                job_env=(),
            )
            process = subprocess.Popen(
                [*self._command, "check", "-"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=scratch,
                env=environment,
                start_new_session=True,
            )
            try:
                out, err = process.communicate(order.model_dump_json().encode(), timeout=request.limit_seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return self._failed(request, f"The check took longer than {request.limit_seconds:g} s.")
        try:
            answer = CheckAnswer.model_validate_json(out)
        except ValidationError:
            last = err.decode("utf-8", "replace").strip().splitlines()[-1:] or ["nothing"]
            logger.warning("A check ended with %d and said %s", process.returncode, last[0])
            return self._failed(request, "The check ended without an answer; see the worker's log.")
        return CheckResult(check_id=request.check_id, worker=settings.worker_name, answer=answer)

    def _failed(self, request: CheckRequest, why: str) -> CheckResult:
        return CheckResult(check_id=request.check_id, worker=self._settings.worker_name, failure=why)
