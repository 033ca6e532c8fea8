"""``python -m zeta_core RUN_DIR``: one run directory, trained by one process or by several.

Guaranteed: every process of the run holds ``RUN_DIR/lock`` shared; the journal's last line is a status with a reason
and an error, whatever happens but a kill that cannot be caught (its worker writes the line then); SIGTERM and the
``stop`` file end the run after the current optimizer step, with a checkpoint unless it was cancelled. The exit code is
0 when the run ended as it was told to, 1 when it failed.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError

from zeta_core.contract.errors import ZetaError
from zeta_core.contract.events import ErrorLine, StatusLine
from zeta_core.contract.job import JobStatus, StatusReason
from zeta_core.contract.layout import JOURNAL_FILE, LOCK_FILE, RUN_FILE, STOP_FILE, RunFile, StopFile
from zeta_core.contract.spec import JobSpec
from zeta_core.contract.validation import parse
from zeta_core.failures import explain
from zeta_core.report import Journal, Report
from zeta_core.settings import Place, place


def main(run_dir: Path) -> int:
    """Train the run directory in this process (one rank of several when a launcher started it); the exit code."""
    here = place()
    lock = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)  # inherited by no one, kept until the end
    fcntl.flock(lock, fcntl.LOCK_SH)
    report = Report(Journal(run_dir / JOURNAL_FILE)) if here.is_main else Report()
    stop = Stop(run_dir / STOP_FILE)
    signal.signal(signal.SIGTERM, stop.on_signal)
    try:
        line = _train(run_dir, here, report, stop)
    except BaseException as error:
        line = _failed(error, report)
        report.write(line)
        if not isinstance(error, Exception):
            raise
        import traceback

        traceback.print_exception(error, file=sys.stderr)
        return 1
    report.write(line)
    report.close()
    return 0


class Stop:
    """Whether the run was asked to end: by the ``stop`` file, or by SIGTERM, which hands the job back."""

    def __init__(self, file: Path) -> None:
        self._file = str(file)
        self._signalled = False

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signalled = True

    def __call__(self) -> Any:
        try:
            os.stat(self._file)
        except FileNotFoundError:
            return "hand_back" if self._signalled else None
        try:
            return StopFile.model_validate_json(Path(self._file).read_bytes()).action
        except ValidationError:
            return None  # it is still being written; the next step reads it whole


def _train(run_dir: Path, here: Place, report: Report, stop: Callable[[], Any]) -> StatusLine:
    file = RunFile.model_validate_json((run_dir / RUN_FILE).read_bytes())
    spec = parse(JobSpec, _as_resolved(file))

    from zeta_core.data import Places
    from zeta_core.run import Run, execute

    output_dir = Path(file.output_dir).absolute()
    cache = (file.model_extra or {}).get("cache_dir")
    run = Run(
        options=spec,
        model=spec.model,
        output_dir=output_dir,
        cache=Path(str(cache)) if cache else output_dir / "cache",
        places=Places(
            files=_files(file),
            artifacts_root=Path(file.artifacts_root),
            data_root=None if file.data_root is None else Path(file.data_root),
            hub=file.hub,
        ),
        resume_from=None if file.resume_from is None else Path(file.resume_from).absolute(),
        stop=stop,
    )
    outcome = execute(run, here, report)
    match outcome.stopped:
        case "cancel":
            return StatusLine(status=JobStatus.CANCELLED, reason=StatusReason.CANCELLED_BY_USER, result=outcome.result)
        case "pause":
            return StatusLine(status=JobStatus.PAUSED, reason=StatusReason.PAUSED_BY_USER, result=outcome.result)
        case "hand_back":
            return StatusLine(status=JobStatus.QUEUED, reason=StatusReason.HANDED_BACK, result=outcome.result)
        case None:
            return StatusLine(status=JobStatus.SUCCEEDED, reason=StatusReason.COMPLETED, result=outcome.result)


def _as_resolved(file: RunFile) -> dict[str, Any]:
    """The spec as it was sent, with the split into micro-batches that an earlier attempt decided."""
    return dict(file.spec)


def _files(file: RunFile) -> dict[str, Any]:
    files = file.resolved_spec.get("files")
    return files if isinstance(files, dict) else {}


def _failed(error: BaseException, report: Report) -> StatusLine:
    reason, told = explain(error)
    report.write(ErrorLine(code=told.code, message=told.message, hint=told.hint))
    return StatusLine(status=JobStatus.FAILED, reason=reason, message=told.message, error=told)


def run_file_fault(error: ZetaError) -> str:
    return error.message
