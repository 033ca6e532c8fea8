"""The processes of trainings on this machine, by the marks that every one of them carries (Linux)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from zeta_core.contract.wire.run_directory import ATTEMPT_VARIABLE, JOB_VARIABLE


@dataclass(frozen=True)
class TrainingProcess:
    """One process of one attempt; ``rank`` is set in those of several ranks."""

    process: psutil.Process
    job_id: str
    attempt: int
    rank: str | None
    directory: Path  # where it works: its run directory


def trainings(home: Path | None = None) -> list[TrainingProcess]:
    """The living ones, of the worker with this home or of all."""
    return list(_marked(home))


def _marked(home: Path | None) -> Iterator[TrainingProcess]:
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if JOB_VARIABLE not in environment or process.status() == psutil.STATUS_ZOMBIE:
                continue
            directory = Path(process.cwd())
            if home is not None and not directory.is_relative_to(home):
                continue  # of another test that runs beside this one: its marks may say anything
            yield TrainingProcess(
                process,
                job_id=environment[JOB_VARIABLE],
                attempt=int(environment[ATTEMPT_VARIABLE]),
                rank=environment.get("RANK"),
                directory=directory,
            )
        except (psutil.Error, OSError):
            continue  # it ended meanwhile, or is another user's
