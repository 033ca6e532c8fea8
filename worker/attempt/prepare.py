"""Sets up a run directory before its training starts, and brings the checkpoint that it goes on from.

``run.json`` appears whole or not at all, and last: a worker that was killed before leaves a directory that no later one
takes for a run. What lies in the output and not in the store never happened, and is removed; so is what lies in the
store and is newer than the checkpoint to go on from: its attempt ended before the server had heard of it.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from worker.artifacts.store import ArtifactStore, BrokenCheckpoint, GivenUp
from zeta_core.contract.checkpoint import NAME_PATTERN
from zeta_core.contract.layout import PUBLISHED_FILE, RUN_FILE, RunFile

LEAVE_SECONDS = 5.0  # from giving a preparation up to leaving it alone


class Preparation:
    """`prepare` in a thread of ``executor``; it can be given up.

    A store that hangs is not waited for then. It may answer when the next attempt is already being prepared here, so
    the thread looks whether it was given up before it changes anything.
    """

    def __init__(
        self, executor: Executor, order: RunFile, directory: Path, store: ArtifactStore, *, resume: str | None
    ) -> None:
        self._directory = directory
        self._given_up_at: float | None = None
        self._work = executor.submit(prepare, order, directory, store, resume=resume, insist=self._insist)

    @property
    def was_given_up(self) -> bool:
        return self._given_up_at is not None

    @property
    def is_over(self) -> bool:
        """Whether it is done, or has had its time to end since it was given up."""
        had_its_time = self._given_up_at is not None and time.monotonic() - self._given_up_at >= LEAVE_SECONDS
        return had_its_time or self._work.done()

    def give_up(self) -> None:
        """Raises `OSError` where not even the directory can be made, which the last line needs."""
        if self._given_up_at is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._given_up_at = time.monotonic()
            self._work.cancel()  # where no thread was free for it yet

    def error(self) -> BaseException | None:
        """Why there is nothing to start, if so; of one that is done and was not given up."""
        return self._work.exception()

    def _insist(self) -> None:
        if self._given_up_at is not None:
            raise GivenUp


def prepare(
    order: RunFile, directory: Path, store: ArtifactStore, *, resume: str | None, insist: Callable[[], None]
) -> None:
    """Write ``directory`` for ``order``; ``resume`` names a stored checkpoint as ``job_.../step-N``.

    Raises `OSError` (``ENOSPC`` where there is no room) and `BrokenCheckpoint`; and `GivenUp` when ``insist`` does,
    which is asked again and again.
    """
    if (directory / PUBLISHED_FILE).exists():
        # The database was restored from a backup, and counts this attempt again: the earlier one's journal is not its.
        directory.rename(directory.with_name(f"superseded-{directory.name}-{time.time_ns()}"))
    directory.mkdir(parents=True, exist_ok=True)
    store.open_job(order.job_id)
    insist()
    output = Path(order.output_dir)
    job_id, _, name = (resume or "").partition("/")
    is_own = resume is not None and job_id == order.job_id and NAME_PATTERN.match(name) is not None
    _clear_output(output, store, order.job_id, keep=name if is_own else None, insist=insist)
    resume_from: Path | None = None
    store.forget_after(order.job_id, name if is_own else None, insist)
    if is_own:
        resume_from = output / name
        store.fetch_checkpoint(job_id, name, resume_from, insist)
        _refuse_without_room(resume_from)
    elif resume is not None:
        if not NAME_PATTERN.match(name):
            raise BrokenCheckpoint(f"{resume!r} is no checkpoint of a job.")
        resume_from = store.checkpoint(job_id, name)
    insist()
    order = order.model_copy(
        update={"resume_from": None if resume_from is None else str(resume_from), "is_opened": True}
    )
    temporary = directory / f"{RUN_FILE}.new"
    temporary.write_text(order.model_dump_json(indent=2))
    temporary.replace(directory / RUN_FILE)


def _refuse_without_room(checkpoint: Path) -> None:
    """The next checkpoint is as large as this one: without room for it there is nothing to start for."""
    needed = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    if needed > shutil.disk_usage(checkpoint).free:
        raise OSError(errno.ENOSPC, f"the next checkpoint needs {needed / 1e6:.1f} MB")


def _clear_output(
    output: Path, store: ArtifactStore, job_id: str, *, keep: str | None, insist: Callable[[], None]
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for entry in output.iterdir():
        if not entry.is_dir():
            entry.unlink()
        elif keep is None or not store.is_stored(job_id, entry.name, entry):
            insist()
            shutil.rmtree(entry)
