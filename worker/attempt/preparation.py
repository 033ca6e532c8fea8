"""Prepares a run directory before the run starts, and fetches the checkpoint to resume from.

``run.json`` is written atomically and last, so a directory left by a worker that was killed earlier isn't mistaken for
a run. Checkpoints in the output directory that aren't in the store are removed, and so are checkpoints in the store
that are newer than the one to resume from: their attempt ended before the server had recorded them. With several nodes,
node 0 removes those, and every node fetches a copy of the checkpoint to resume from.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from worker.attempt.run_file_signature import write_signed
from zeta_core.contract.job.checkpoint import NAME_PATTERN
from zeta_core.contract.wire.run_directory import PUBLISHED_FILE, RunFile, checkpoint_key
from zeta_core.system.artifact_store import ArtifactStore, BrokenCheckpoint, TransferCancelled

LEAVE_SECONDS = 5.0  # how long to wait for a cancelled preparation


# Fetches the inputs of a complete run file and writes the rules of its sandbox; the second argument raises
# `TransferCancelled` to cancel this. A thread calls it.
PrepareSandbox = Callable[[RunFile, Callable[[], None]], None]


class Preparation:
    """Runs `prepare` in a thread of ``executor``; it can be cancelled with `cancel`.

    Cancelling doesn't wait for a store that hangs. The store may respond while the next attempt is already being
    prepared, so the thread checks for cancellation before every change.
    """

    def __init__(
        self,
        executor: Executor,
        run_file: RunFile,
        directory: Path,
        store: ArtifactStore,
        *,
        resume: str | None,
        prepare_sandbox: PrepareSandbox,
    ) -> None:
        self._directory = directory
        self._cancelled_at: float | None = None
        self._work = executor.submit(
            prepare,
            run_file,
            directory,
            store,
            resume=resume,
            check_cancelled=self._check_cancelled,
            prepare_sandbox=prepare_sandbox,
        )

    @property
    def was_cancelled(self) -> bool:
        return self._cancelled_at is not None

    @property
    def is_over(self) -> bool:
        """Whether it is done, or was cancelled more than `LEAVE_SECONDS` ago."""
        has_timed_out = self._cancelled_at is not None and time.monotonic() - self._cancelled_at >= LEAVE_SECONDS
        return has_timed_out or self._work.done()

    def cancel(self) -> None:
        """Cancel. Raises `OSError` if the directory, which the journal's last line needs, can't be created."""
        if self._cancelled_at is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._cancelled_at = time.monotonic()
            self._work.cancel()  # if no thread has started it yet

    def error(self) -> BaseException | None:
        """The error of a finished preparation that was not cancelled, if any."""
        return self._work.exception()

    def _check_cancelled(self) -> None:
        if self._cancelled_at is not None:
            raise TransferCancelled


def prepare(
    run_file: RunFile,
    directory: Path,
    store: ArtifactStore,
    *,
    resume: str | None,
    check_cancelled: Callable[[], None],
    prepare_sandbox: PrepareSandbox | None = None,
) -> None:
    """Write ``directory`` for ``run_file``; ``resume`` names a stored checkpoint as ``job_.../step-N``.

    Raises `OSError` (``ENOSPC`` if the disk is full), `BrokenCheckpoint`, and `TransferCancelled` if
    ``check_cancelled``, which is called before every change, raises it.
    """
    if (directory / PUBLISHED_FILE).exists():
        # The database was restored from a backup and has reused this attempt number; set the earlier run aside.
        directory.rename(directory.with_name(f"superseded-{directory.name}-{time.time_ns()}"))
    directory.mkdir(parents=True, exist_ok=True)
    store.open_job(run_file.job_id)
    check_cancelled()
    output = Path(run_file.output_dir)
    job_id, _, name = (resume or "").partition("/")
    is_own = resume is not None and job_id == run_file.job_id and NAME_PATTERN.match(name) is not None
    _clear_output(output, store, run_file.job_id, keep=name if is_own else None, check_cancelled=check_cancelled)
    resume_from: Path | None = None
    if run_file.node_rank == 0:
        store.remove_newer_checkpoints(run_file.job_id, name if is_own else None, check_cancelled)
    if is_own:
        resume_from = output / name
        store.fetch_checkpoint(job_id, name, resume_from, check_cancelled)
        _require_space(resume_from)
    elif resume is not None:
        if not NAME_PATTERN.match(name):
            raise BrokenCheckpoint(f"{resume!r} is not a checkpoint of a job.")
        resume_from = store.local(checkpoint_key(job_id, name), check_cancelled)
    check_cancelled()
    run_file = run_file.model_copy(
        update={"resume_from": None if resume_from is None else str(resume_from), "is_opened": True}
    )
    if prepare_sandbox is not None:
        prepare_sandbox(run_file, check_cancelled)
    write_signed(directory, run_file.model_dump_json(indent=2).encode())


def _require_space(checkpoint: Path) -> None:
    """Raise `OSError` if there is no space for the next checkpoint, which will be as large as this one."""
    needed = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    if needed > shutil.disk_usage(checkpoint).free:
        raise OSError(errno.ENOSPC, f"the next checkpoint needs {needed / 1e6:.1f} MB")


def _clear_output(
    output: Path, store: ArtifactStore, job_id: str, *, keep: str | None, check_cancelled: Callable[[], None]
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for entry in output.iterdir():
        if not entry.is_dir():
            entry.unlink()
        elif keep is None or not store.is_stored(job_id, entry.name, entry):
            check_cancelled()
            shutil.rmtree(entry)
