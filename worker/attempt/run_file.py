"""The run file of an attempt: creating it for a new attempt, and finding those that an earlier worker process left."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

from worker.attempt.run_file_signature import read_signed
from worker.run import processes
from worker.run.processes import RunProcesses
from worker.settings import WorkerSettings
from zeta_core.contract.access import HubAccess
from zeta_core.contract.wire.messages import Dispatch
from zeta_core.contract.wire.run_directory import (
    ENVIRONMENTS_DIRECTORY,
    PUBLISHED_FILE,
    RunFile,
    output_directory,
    project_cache,
)

logger = logging.getLogger(__name__)


def new_run_file(message: Dispatch, settings: WorkerSettings) -> RunFile:
    """The run file of an attempt that the server has dispatched."""
    hub = settings.hub_access(message.hub)
    return RunFile(
        kind=message.job_kind,
        job_id=message.job_id,
        attempt=message.attempt,
        project=message.project,
        spec=message.spec,
        resolved_spec=message.resolved_spec,
        output_dir=str(settings.root / output_directory(message.job_id)),
        cache_dir=str(settings.root / project_cache(message.project)),
        artifacts_root=str(settings.artifacts),
        data_root=str(settings.data_root) if settings.data_root else None,
        hub=hub != HubAccess.OFF,
        hub_access=hub,
        bases=message.bases,
        processes=message.processes,
        num_nodes=message.num_nodes,
        node_rank=message.node_rank,
        slots=message.slots,
        self_stop_seconds=settings.self_stop_seconds,
        end_seconds=settings.end_seconds,
        journal_max_lines=settings.journal_max_lines,
        environments_dir=str(settings.home / ENVIRONMENTS_DIRECTORY / message.project),
        gguf_python=None if settings.gguf_python is None else str(settings.gguf_python),
    )


def unpublished_run_files(home: Path, root: Path) -> Iterator[RunFile]:
    """The run files of the attempts that an earlier process of this worker left running or unpublished.

    ``root`` is the worker's own folder in ``home``. A run without a readable ``run.json`` can't be adopted: its
    processes are killed, and the server starts the job again. A run directory that was copied with its home belongs to
    the original's worker: its processes are not touched, and nothing is stored or published for it. The server of this
    home starts the job again from the last stored checkpoint. A run that was taken over can't escape adoption by
    changing its files.
    """
    for directory in sorted(root.glob("runs/*/attempt-*")):
        run_processes = RunProcesses.from_directory(directory)
        if run_processes is None:
            continue
        if (directory / PUBLISHED_FILE).exists():
            if processes.is_locked(directory):  # the run has written this file itself
                _end(run_processes, "it claims to have been published, but has processes")
            continue
        try:
            run_file = RunFile.model_validate_json(read_signed(directory))
        except (OSError, ValueError) as error:
            _end(run_processes, str(error))
            continue
        if _is_copied(directory, run_file, root):
            others = run_processes.in_other_homes(home)
            logger.warning(
                "The run in %s was copied from another home; its processes belong to that home and are not touched%s.",
                directory,
                f" ({'; '.join(others)})" if others else "",
                extra={"action": "other_home", "job_id": run_file.job_id, "attempt": run_file.attempt},
            )
            with contextlib.suppress(OSError):  # the next start detects it again
                (directory / PUBLISHED_FILE).touch()
            continue
        yield run_file


def _end(run_processes: RunProcesses, reason: str) -> None:
    """Kill the processes of a run that can't be adopted."""
    logger.warning("The run in %s cannot be adopted: %s", run_processes.directory, reason, extra={"action": "adopt"})
    processes.send([*run_processes.alive(), *run_processes.lock_holders()], signal.SIGKILL)


def _is_copied(directory: Path, run_file: RunFile, root: Path) -> bool:
    copied = processes.is_copied(directory)
    if copied is not None:
        return copied
    # An older worker recorded no identity; the run is a copy if its output directory is another folder.
    named, expected = Path(run_file.output_dir), root / output_directory(run_file.job_id)
    return named.is_dir() and not (expected.is_dir() and named.samefile(expected))
