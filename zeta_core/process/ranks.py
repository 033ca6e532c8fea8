"""Training in several ranks: starting those of this node, and determining how all of them ended."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path

import psutil
import torch
from pydantic import ValidationError
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from zeta_core.contract.job.events import StatusLine
from zeta_core.contract.job.job import JobError, JobErrorEvidence
from zeta_core.contract.job.status import REASON_SENTENCES, JobStatus, StatusReason
from zeta_core.contract.wire.node_group import NodeGroup
from zeta_core.contract.wire.run_directory import DISK_FULL_EXIT, STACKS_SIGNAL, RunFile
from zeta_core.environment import thread_variables, variables
from zeta_core.failures import DiskFull, TrainingFailed
from zeta_core.process.elastic_agent import run_ranks
from zeta_core.process.end_lines import END_FILE, cause_of, handed_back, is_lost_connection, line_for_error
from zeta_core.process.node_interface import interface_variables
from zeta_core.process.node_link import SILENT_SECONDS, NodeLink
from zeta_core.process.stop import Stop
from zeta_core.process.worker_monitor import WorkerMonitor
from zeta_core.report.reporter import Reporter
from zeta_core.system.oom_kills import OomKills, count_oom_kills, oom_kill_error

STACKS_SECONDS = 2.0  # for the ranks of this node to write their stacks before they are killed


def train_in_processes(
    run_dir: Path, file: RunFile, stop: Stop, worker_monitor: WorkerMonitor, report: Reporter
) -> StatusLine:
    """Start the ranks of this node, wait for those of all nodes, and return the final status line."""
    for old in run_dir.glob(END_FILE.format("*")):
        old.unlink()
    group = file.node_group
    if group is None:
        return _run(run_dir, file, stop, worker_monitor)
    with variables(**interface_variables(group.address)), closing(NodeLink(group, _run_id(file))) as link:
        link.connect()
        measured = link.check_network()
        if group.node_rank == 0:
            report.log(measured)
        link.watch(on_loss=_end_ranks)
        try:
            own = _run(run_dir, file, stop, worker_monitor)
        except Exception as error:  # noqa: BLE001 - the other nodes wait until they know how this one ended
            own = line_for_error(error)
        ends = link.exchange_ends(own)
        if link.lost is not None:
            return _lost(group, link.lost, f"did not respond to the other nodes for {SILENT_SECONDS:.0f} s")
        cause = cause_of(list(ends.values()), across_nodes=True)
        missing = [node for node in range(group.num_nodes) if node not in ends]
        if missing and is_lost_connection(cause):
            return _lost(group, missing[0], "has closed its connections to the other nodes and no longer responds")
        return cause


def _run_id(file: RunFile) -> str:
    return f"{file.job_id}-{file.attempt}"


def _run(run_dir: Path, file: RunFile, stop: Stop, worker_monitor: WorkerMonitor) -> StatusLine:
    """Run the ranks of this node, and return the line that explains how they ended. Raises `TrainingFailed`."""
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // file.processes))}
    if worker_monitor.is_lost:
        return handed_back()  # new ranks might not detect the lost worker before this process must exit
    stop.write_on_signal = True
    stop.exits_on_signal = False  # each rank receives SIGTERM itself
    oom_kills = count_oom_kills()
    command = (sys.executable, "-P", "-m", "zeta_core", str(run_dir))  # -P: nothing is imported from RUN_DIR
    with variables(**(threads | thread_variables(file.resolved_spec.threads))):
        failures = run_ranks(command, num_processes=file.processes, run_id=_run_id(file), group=file.node_group)
    ends = _read_ends(run_dir)
    killed = _killed_rank(failures, run_dir, oom_kills)
    if killed is not None:
        ends.append(killed)
    if any(failure.exitcode == DISK_FULL_EXIT for failure in failures.values()):
        ends.append(line_for_error(DiskFull(REASON_SENTENCES[StatusReason.DISK_FULL])))
    if not ends or (failures and all(end.status is JobStatus.SUCCEEDED for end in ends)):
        raise TrainingFailed(_exit_without_reason(failures))
    return cause_of(ends)


def _read_ends(run_dir: Path) -> list[StatusLine]:
    """How the ranks of this node ended. On a full disk, a rank leaves an incomplete file."""
    ends: list[StatusLine] = []
    for path in sorted(run_dir.glob(END_FILE.format("*"))):
        with suppress(ValidationError):
            ends.append(StatusLine.model_validate_json(path.read_bytes()))
    return ends


def _killed_rank(failures: Mapping[int, ProcessFailure], run_dir: Path, oom_kills: OomKills) -> StatusLine | None:
    """The status line if a rank was killed from outside (elastic ends the other ranks with SIGTERM)."""
    for rank, failure in failures.items():
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


def _exit_without_reason(failures: Mapping[int, ProcessFailure]) -> str:
    if not failures:
        return "The training processes exited without reporting a reason."
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    return f"Rank {rank} exited with code {failure.exitcode}; see the log."


def _end_ranks() -> None:
    """Let the ranks of this node write their stacks to the log, and kill them: they wait for a node that is lost."""
    ranks = [child for child in psutil.Process().children() if _is_rank(child)]
    _signal(ranks, signal.Signals[STACKS_SIGNAL])
    threading.Event().wait(STACKS_SECONDS)
    _signal(ranks, signal.SIGKILL)


def _is_rank(process: psutil.Process) -> bool:
    try:
        return "RANK" in process.environ()
    except psutil.Error:
        return False


def _signal(ranks: list[psutil.Process], number: signal.Signals) -> None:
    for rank in ranks:
        with suppress(psutil.Error):
            rank.send_signal(number)  # not if another process has its id by now


def _lost(group: NodeGroup, node: int, what: str) -> StatusLine:
    """The status line if a node was lost; ``what`` completes the sentence that begins with its name."""
    message = f"{group.title(node)} {what}."
    reason = StatusReason.NODE_LOST
    hint = "See the logs of its worker and the network; the log of this job contains the stacks of the other ranks."
    error = JobError(code=reason, message=message, hint=hint, evidence=JobErrorEvidence(node=node))
    return StatusLine(status=JobStatus.FAILED, reason=reason, message=message, error=error)
