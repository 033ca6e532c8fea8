"""``python -m zeta_core RUN_DIR``: train one run directory, in one process or several.

Guarantees: every process of the run holds a shared lock on ``RUN_DIR/lock``. The journal's last line is a status with a
reason and an error; after an uncatchable kill, the worker writes this line. SIGTERM and the ``stop`` file end the run
after the current optimizer step, with a checkpoint unless it was cancelled. Losing contact with the worker for
``self_stop_seconds`` does the same, and after ``end_seconds`` the process exits immediately. Before the first step,
there is nothing to save, and SIGTERM ends the run immediately. The exit code is 0 if the run ended as requested, 1 if
it failed, and `DISK_FULL_EXIT` if the disk was full.
"""

from __future__ import annotations

import errno
import faulthandler
import fcntl
import gc
import os
import signal
from collections.abc import Callable
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

from zeta_core.contract.identifiers import creation_time
from zeta_core.contract.job.events import ErrorLine, StatusLine
from zeta_core.contract.job.status import STOP_ENDS, JobStatus, StatusReason
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.range_test import FIND
from zeta_core.contract.spec.validation import parse
from zeta_core.contract.wire.run_directory import (
    ALIVE_FILE,
    DISK_FULL_EXIT,
    JOURNAL_FILE,
    LOCK_FILE,
    RUN_FILE,
    SAVE_FILE,
    STACKS_SIGNAL,
    STOP_FILE,
    RunFile,
)
from zeta_core.environment import ProcessRank, job_id, thread_variables, variables
from zeta_core.process.end_lines import END_FILE, ended_by_sigterm, handed_back, line_for_error, line_if_interrupted
from zeta_core.process.save_requests import SaveRequests
from zeta_core.process.stop import Interrupted, Stop
from zeta_core.process.worker_monitor import WorkerMonitor
from zeta_core.report.journal_writer import JournalWriter
from zeta_core.report.library_noise import hide_library_noise
from zeta_core.report.reporter import Console, Reporter, WithoutWarnings

STANDARD_ERROR = 2

# Executes a job that is not a training, in this process, and returns the journal's last line.
Execute = Callable[[Path, RunFile, Reporter, Stop], StatusLine]


def main(run_dir: Path, execute: Execute | None = None) -> int:
    """Train the run directory, in this process or in several that it starts. Returns the exit code.

    ``execute`` does the work of a job that is not a training instead.

    Each of several ranks writes its status line to a file. After all of them have exited, the process that started them
    writes the journal's last line: the first rank's status line, or that of the first failure.
    """
    hide_library_noise()
    rank = ProcessRank.from_environment().on_its_node()
    lock = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited, held until the process exits
    fcntl.flock(lock, fcntl.LOCK_SH)
    faulthandler.register(signal.Signals[STACKS_SIGNAL], file=STANDARD_ERROR, all_threads=True)
    is_disk_full = False  # an error exit code, so elastic ends the other ranks, which would wait for this one
    worker_monitor = WorkerMonitor(run_dir / ALIVE_FILE)
    stop = Stop(run_dir / STOP_FILE, worker_monitor)
    signal.signal(signal.SIGTERM, stop.on_signal)
    with closing(JournalWriter(run_dir / JOURNAL_FILE)) as journal, closing(worker_monitor):
        report = _reporter(rank, journal)
        try:
            file = RunFile.model_validate_json((run_dir / RUN_FILE).read_bytes())
            journal.max_lines = file.journal_max_lines
            worker_monitor.start(file, lambda: None if rank.launched else journal.write(handed_back()))
            if execute is not None:
                line = execute(run_dir, file, report, stop)
            elif (file.processes > 1 or file.node_group is not None) and not rank.launched:
                with stop.deferred():
                    from zeta_core.process.ranks import train_in_processes
                line = train_in_processes(run_dir, file, stop, worker_monitor, report)
            else:
                with variables(**thread_variables(file.resolved_spec.threads)):  # torch reads it when it is imported
                    line = _train(file, rank, report, stop, SaveRequests(run_dir / SAVE_FILE))
        except Interrupted:
            line = ended_by_sigterm(stop() or "hand_back")
        except BaseException as error:  # noqa: BLE001 - the journal reports any exception before the process exits
            line = line_for_error(error)
            is_disk_full = line.reason is StatusReason.DISK_FULL
        stop.exits_on_signal = False  # the last line must be written completely
        if line.status is JobStatus.FAILED and worker_monitor.is_lost:
            line = handed_back()  # a rank that lost the worker caused the others to fail
        elif line.status is JobStatus.FAILED and stop.was_signalled:
            line = line_if_interrupted(line, stop())
        try:
            if rank.launched:
                (run_dir / END_FILE.format(rank.rank)).write_text(line.model_dump_json(exclude_none=True))
            else:
                _write_end(line, journal, Console(job_id()))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return DISK_FULL_EXIT
    return DISK_FULL_EXIT if is_disk_full else int(line.status is JobStatus.FAILED)


def _reporter(rank: ProcessRank, journal: JournalWriter) -> Reporter:
    """The reporter of a rank, or of the process that starts the ranks. The console is train.log.

    The first rank of every other node also writes a journal, from which its worker sees that the run makes progress.
    """
    if rank.is_main:
        return Reporter(journal, Console(job_id()))
    return Reporter(WithoutWarnings(journal)) if rank.is_first_of_node else Reporter()


def _write_end(line: StatusLine, journal: JournalWriter, console: Console) -> None:
    failure: ErrorLine | None = None
    if line.error is not None:
        failure = ErrorLine(
            code=line.error.code, message=line.error.message, hint=line.error.hint, patch=line.error.patch
        )
        journal.write(failure)
    journal.write(line)
    if failure is not None:
        console.write(failure)


def _train(file: RunFile, rank: ProcessRank, report: Reporter, stop: Stop, save_requests: SaveRequests) -> StatusLine:
    spec = parse(JobSpec, _spec_with_first_choices(file))

    with stop.deferred():
        from zeta_core.data.sources import SourceLocations
        from zeta_core.run import RunRequest, execute

    gc.freeze()  # libraries stay until the exit; each collection would take half a second to examine their objects
    output_dir = Path(file.output_dir).absolute()
    request = RunRequest(
        options=spec,
        model=spec.model,
        output_dir=output_dir,
        cache=file.cache,
        locations=SourceLocations.of_run(file),
        resume_from=None if file.resume_from is None else Path(file.resume_from).absolute(),
        threads=file.resolved_spec.threads,  # another number gives different bits
        device_kind=file.resolved_spec.device_kind,
        started_on=_submitted_on(file),
        stop=stop,
        newest_save_request=save_requests.newest,
        on_training_start=stop.on_training_start,
    )
    outcome = execute(request, rank, report)
    if outcome.stopped is None:
        return StatusLine(status=JobStatus.SUCCEEDED, reason=StatusReason.COMPLETED, result=outcome.result)
    status, reason = STOP_ENDS[outcome.stopped]
    return StatusLine(status=status, reason=reason, result=outcome.result)


def _spec_with_first_choices(file: RunFile) -> dict[str, Any]:
    """The submitted spec with the values that the first attempt chose, even if it saved no checkpoint.

    These are the batch split and the precision, which depend on the machine, and the rate that a range test chose.
    """
    spec = dict(file.spec)
    for names in (("batch_size", "gradient_accumulate_every"), ("mixed_precision",)):
        if all(spec.get(name) is None and file.resolved_spec.value(name) is not None for name in names):
            spec |= {name: file.resolved_spec.value(name) for name in names}
    if spec.get("learning_rate") == FIND and file.resolved_spec.learning_rate is not None:
        spec["learning_rate"] = file.resolved_spec.learning_rate
    return spec


def _submitted_on(file: RunFile) -> date | None:
    """The day on which the job was submitted, in UTC, which is part of its id. It is the same for all attempts."""
    submitted = creation_time(file.job_id)
    return None if submitted is None else submitted.date()
