"""Finds the processes of runs on this machine by their environment variables (Linux)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from zeta_core.contract.wire.run_directory import ATTEMPT_VARIABLE, JOB_VARIABLE


@dataclass(frozen=True)
class TrainingProcess:
    """One process of an attempt; ``rank`` is set if the attempt has several. A suspended one (SIGSTOP) can't train."""

    process: psutil.Process
    job_id: str
    attempt: int
    rank: str | None
    directory: Path  # its working directory, which is the run directory
    is_suspended: bool


def training_processes(home: Path | None = None) -> list[TrainingProcess]:
    """The living training processes, of all workers or of those with this home."""
    return list(_marked(home))


def _marked(home: Path | None) -> Iterator[TrainingProcess]:
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if JOB_VARIABLE not in environment or (status := process.status()) == psutil.STATUS_ZOMBIE:
                continue
            directory = Path(process.cwd())
            if home is not None and not directory.is_relative_to(home):
                continue  # of another test that runs at the same time
            yield TrainingProcess(
                process,
                job_id=environment[JOB_VARIABLE],
                attempt=int(environment[ATTEMPT_VARIABLE]),
                rank=environment.get("RANK"),
                directory=directory,
                is_suspended=status == psutil.STATUS_STOPPED,
            )
        except (psutil.Error, OSError):
            continue  # it has ended, or belongs to another user
