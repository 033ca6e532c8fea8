"""Finds runs that an earlier process of this worker left behind: still alive, or not fully published.

A run without a readable ``run.json`` can't be adopted: its processes are killed, and the server starts the job again. A
run directory that was copied with its home belongs to the original's worker: its training is not touched, and nothing
is stored or published for it. The server of this home starts the job again from the last stored checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from worker.training import processes
from worker.training.processes import RunProcesses
from zeta_core.contract.wire.run_directory import PUBLISHED_FILE, RUN_FILE, RunFile, output_directory

logger = logging.getLogger(__name__)


def unpublished_runs(home: Path, root: Path) -> Iterator[RunFile]:
    """The runs to adopt; ``root`` is the worker's own folder in ``home``."""
    for directory in sorted(root.glob("runs/*/attempt-*")):
        found = RunProcesses.of(directory)
        if found is None or (directory / PUBLISHED_FILE).exists():
            continue
        try:
            order = RunFile.model_validate_json((directory / RUN_FILE).read_text())
        except (OSError, ValidationError) as error:
            logger.warning("The run in %s cannot be adopted: %s", directory, error)
            processes.send(found.alive(), signal.SIGKILL)
            continue
        if _is_copied(directory, order, root):
            others = found.of_other_homes(home)
            logger.warning(
                "The run in %s was copied from another home; its training belongs to that home and is not touched%s.",
                directory,
                f" ({'; '.join(others)})" if others else "",
                extra={"action": "other_home", "job_id": order.job_id, "attempt": order.attempt},
            )
            with contextlib.suppress(OSError):  # the next start detects it again
                (directory / PUBLISHED_FILE).touch()
            continue
        yield order


def _is_copied(directory: Path, order: RunFile, root: Path) -> bool:
    copied = processes.is_copied(directory)
    if copied is not None:
        return copied
    # An older worker recorded no identity; the run is a copy if its output directory is another folder.
    named, expected = Path(order.output_dir), root / output_directory(order.job_id)
    return named.is_dir() and not (expected.is_dir() and named.samefile(expected))
