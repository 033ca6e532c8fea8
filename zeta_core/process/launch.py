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
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager, suppress
from datetime import date
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError

from zeta_core.contract.identifiers import creation_time
from zeta_core.contract.job.events import ErrorLine, StatusLine
from zeta_core.contract.job.job import JobError, JobErrorEvidence
from zeta_core.contract.job.status import REASON_SENTENCES, STOP_ENDS, JobStatus, StatusReason, StopAction
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
    StopFile,
)
from zeta_core.environment import ProcessRank, job_id, variables
from zeta_core.failures import TrainingFailed, explain
from zeta_core.process.save_requests import SaveRequests
from zeta_core.process.worker_monitor import WorkerMonitor
from zeta_core.report.journal_writer import JournalWriter
from zeta_core.report.library_noise import hide_library_noise
from zeta_core.report.reporter import Console, Reporter
from zeta_core.system.oom_kills import OomKills, count_oom_kills, oom_kill_error

STANDARD_ERROR = 2
END_FILE = "rank-{}.end"  # the final status line of one of several ranks


# Executes a job that is not a training, in this process, and returns the journal's last line.
Execute = Callable[[Path, RunFile, Reporter, "Stop"], StatusLine]


def main(run_dir: Path, execute: Execute | None = None) -> int:
    """Train the run directory, in this process or in several that it starts. Returns the exit code.

    ``execute`` does the work of a job that is not a training instead.

    Each of several ranks writes its status line to a file. After all of them have exited, the process that started them
    writes the journal's last line: the first rank's status line, or that of the first failure.
    """
    hide_library_noise()
    rank = ProcessRank.from_environment()
    lock = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited, held until the process exits
    fcntl.flock(lock, fcntl.LOCK_SH)
    faulthandler.register(signal.Signals[STACKS_SIGNAL], file=STANDARD_ERROR, all_threads=True)
    is_disk_full = False  # an error exit code, so elastic ends the other ranks, which would wait for this one
    worker_monitor = WorkerMonitor(run_dir / ALIVE_FILE)
    stop = Stop(run_dir / STOP_FILE, worker_monitor)
    signal.signal(signal.SIGTERM, stop.on_signal)
    with closing(JournalWriter(run_dir / JOURNAL_FILE)) as journal, closing(worker_monitor):
        report = Reporter(journal, Console(job_id())) if rank.is_main else Reporter()  # the console is train.log
        try:
            file = RunFile.model_validate_json((run_dir / RUN_FILE).read_bytes())
            journal.max_lines = file.journal_max_lines
            worker_monitor.start(file, lambda: None if rank.launched else journal.write(_handed_back()))
            if execute is not None:
                line = execute(run_dir, file, report, stop)
            elif file.processes > 1 and not rank.launched:
                line = _train_in_processes(run_dir, file, stop, worker_monitor)
            else:
                with variables(**_thread_variables(file)):  # torch reads it when it is imported
                    line = _train(file, rank, report, stop, SaveRequests(run_dir / SAVE_FILE))
        except Interrupted:
            line = _ended_by_sigterm(stop() or "hand_back")
        except BaseException as error:  # noqa: BLE001 - the journal reports any exception before the process exits
            line = _end_by(error)
            is_disk_full = line.reason is StatusReason.DISK_FULL
        stop.exits_on_signal = False  # the last line must be written completely
        if line.status is JobStatus.FAILED and worker_monitor.is_lost:
            line = _handed_back()  # a rank that lost the worker caused the others to fail
        elif line.status is JobStatus.FAILED and stop.was_signalled:
            line = _interrupted(line, stop())
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


def _end_by(error: BaseException) -> StatusLine:
    """The status line for ``error``. A full disk is not a failure: the job continues when there is space."""
    with suppress(OSError):  # the journal needs its last line even if the log cannot be written
        traceback.print_exception(error, file=sys.stderr)
    reason, explanation = explain(error)
    if reason is StatusReason.DISK_FULL:
        status, reason = STOP_ENDS["disk"]
        message = explanation.message
        if not isinstance(error, TrainingFailed):
            message = f"{REASON_SENTENCES[reason]} ({message})"
        return StatusLine(status=status, reason=reason, message=message)
    return StatusLine(status=JobStatus.FAILED, reason=reason, message=explanation.message, error=explanation)


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


def _handed_back() -> StatusLine:
    status, reason = STOP_ENDS["hand_back"]
    message = "Lost contact with the worker, so the training ended before another worker could start it again."
    return StatusLine(status=status, reason=reason, message=message)


def _interrupted(line: StatusLine, requested: StopAction | None) -> StatusLine:
    """The status line of a run that SIGTERM ended where it could not stop by itself, such as in a compiler.

    SIGTERM reaches every process of the run. Errors of interrupted processes are not failures of the job, but an error
    with a specific code still is.
    """
    if requested is None or line.reason is not StatusReason.TRAIN_ERROR:
        return line
    if line.error is not None and line.error.code != StatusReason.TRAIN_ERROR:
        return line
    return _ended_by_sigterm(requested)


def _ended_by_sigterm(requested: StopAction) -> StatusLine:
    status, reason = STOP_ENDS[requested]
    return StatusLine(status=status, reason=reason, message=f"{REASON_SENTENCES[reason]} (Ended by SIGTERM.)")


class Interrupted(BaseException):
    """SIGTERM arrived before the first step, so nothing is saved. Not an `Exception`, which a library might catch."""


class Stop:
    """The requested stop action: that of the ``stop`` file, or to hand the job back after SIGTERM or a lost worker.

    While ``exits_on_signal`` is set, SIGTERM raises `Interrupted` once, wherever the main thread is.
    """

    def __init__(self, file: Path, worker_monitor: WorkerMonitor) -> None:
        self._file = str(file)
        self._worker_monitor = worker_monitor
        self.was_signalled = False
        self.exits_on_signal = True
        self.write_on_signal = False  # in the process that starts the ranks, because all of them read the file

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.was_signalled = True
        if self.write_on_signal and not os.path.exists(self._file):
            Path(self._file).write_text(StopFile(action="hand_back").model_dump_json())
        if self.exits_on_signal:
            self.exits_on_signal = False
            raise Interrupted

    @contextmanager
    def deferred(self) -> Generator[None]:
        """Defer SIGTERM, because an exception during the initialization of torch's C++ code aborts the process."""
        exits_on_signal, self.exits_on_signal = self.exits_on_signal, False
        yield
        self.exits_on_signal = exits_on_signal
        if exits_on_signal and self.was_signalled:
            self.exits_on_signal = False
            raise Interrupted

    def on_training_start(self) -> None:
        """Let the run stop by itself between two steps from now on."""
        self.exits_on_signal = False

    def __call__(self) -> StopAction | None:
        try:
            os.stat(self._file)
        except FileNotFoundError:
            return "hand_back" if self.was_signalled or self._worker_monitor.is_lost else None
        try:
            return StopFile.model_validate_json(Path(self._file).read_bytes()).action
        except ValidationError:
            return None  # it is incomplete; the next step reads it again


def _train_in_processes(run_dir: Path, file: RunFile, stop: Stop, worker_monitor: WorkerMonitor) -> StatusLine:
    """Start the ranks with torch elastic, without restarts, and wait for them. Returns the final status line."""
    with stop.deferred():
        import torch
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for old in run_dir.glob(END_FILE.format("*")):
        old.unlink()
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // file.processes))}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=file.processes,
        run_id=f"{file.job_id}-{file.attempt}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        # SIGTERM is converted to the stop file, which lets the ranks save; elastic would end them.
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
    )
    if worker_monitor.is_lost:
        return _handed_back()  # new ranks might not detect the lost worker before this process must exit
    stop.write_on_signal = True
    stop.exits_on_signal = False  # each rank receives SIGTERM itself
    oom_kills = count_oom_kills()
    killed: StatusLine | None = None
    ranks_failed: str | None = None
    with variables(**(threads | _thread_variables(file))):
        try:
            elastic_launch(config, sys.executable)("-m", "zeta_core", str(run_dir))
        except ChildFailedError as error:
            killed = _killed_rank(error, run_dir, oom_kills)
            ranks_failed = _first_failure(error)
    ends = [StatusLine.model_validate_json(path.read_bytes()) for path in sorted(run_dir.glob(END_FILE.format("*")))]
    full = next((end for end in ends if end.reason is StatusReason.DISK_FULL), None)
    if full is not None:
        return full
    if killed is not None:
        return killed  # errors of the other ranks are a consequence
    failed = sorted((end for end in ends if end.status is JobStatus.FAILED), key=lambda end: end.created_at)
    if failed:
        return failed[0]
    if ranks_failed is not None or not ends:
        raise TrainingFailed(ranks_failed or "The training processes exited without reporting a reason.")
    return ends[0]


def _killed_rank(error: Any, run_dir: Path, oom_kills: OomKills) -> StatusLine | None:
    """The status line if a rank was killed from outside (elastic ends the other ranks with SIGTERM)."""
    for rank, failure in error.failures.items():
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:
            name = signal.Signals(-failure.exitcode).name
            reason = StatusReason.PROCESS_KILLED
            evidence = JobErrorEvidence(signal=name, rank=rank)
            memory = oom_kill_error(run_dir, oom_kills, evidence) if name == "SIGKILL" else None
            if memory is not None:
                reason = StatusReason.OUT_OF_MEMORY
                return StatusLine(status=JobStatus.FAILED, reason=reason, message=memory.message, error=memory)
            failed = JobError(code=reason, message=f"Rank {rank} was killed by {name} from outside.", evidence=evidence)
            return StatusLine(status=JobStatus.FAILED, reason=reason, message=failed.message, error=failed)
    return None


def _first_failure(error: Any) -> str:
    rank, failure = error.get_first_failure()
    return f"Rank {rank} exited with code {failure.exitcode}; see the log."


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
        cache=output_dir / "cache" if file.cache_dir is None else Path(file.cache_dir),
        locations=SourceLocations(
            files=file.resolved_spec.files,
            artifacts_root=Path(file.artifacts_root),
            bases=frozenset(file.bases),
            data_root=None if file.data_root is None else Path(file.data_root),
            allow_hub=file.hub,
        ),
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


def _thread_variables(file: RunFile) -> dict[str, str]:
    threads = file.resolved_spec.threads
    return {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
