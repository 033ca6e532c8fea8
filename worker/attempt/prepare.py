"""Sets up a run directory before its training starts, and brings the checkpoint that it goes on from.

``run.json`` appears whole or not at all, and last: a worker that was killed before leaves a directory that no later one
takes for a run. What lies in the output and not in the store never happened, and is removed; so is what lies in the
store and is newer than the checkpoint to go on from: its attempt ended before the server had heard of it.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from worker.artifacts.store import ArtifactStore, BrokenCheckpoint
from zeta_core.contract.checkpoint import NAME_PATTERN
from zeta_core.contract.layout import RUN_FILE, RunFile


def prepare(order: RunFile, directory: Path, store: ArtifactStore, *, resume: str | None) -> None:
    """Write ``directory`` for ``order``; ``resume`` names a stored checkpoint as ``job_.../step-N``.

    Raises `OSError` (``ENOSPC`` where there is no room) and `BrokenCheckpoint`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    output = Path(order.output_dir)
    job_id, _, name = (resume or "").partition("/")
    is_own = resume is not None and job_id == order.job_id and NAME_PATTERN.match(name) is not None
    _clear_output(output, store, order.job_id, keep=name if is_own else None)
    resume_from: Path | None = None
    store.forget_after(order.job_id, name if is_own else None)
    if is_own:
        resume_from = output / name
        store.fetch_checkpoint(job_id, name, resume_from)
        _refuse_without_room(resume_from)
    elif resume is not None:
        if not NAME_PATTERN.match(name):
            raise BrokenCheckpoint(f"{resume!r} is no checkpoint of a job.")
        resume_from = store.checkpoint(job_id, name)
    order = order.model_copy(update={"resume_from": None if resume_from is None else str(resume_from)})
    temporary = directory / f"{RUN_FILE}.new"
    temporary.write_text(order.model_dump_json(indent=2))
    temporary.replace(directory / RUN_FILE)


def _refuse_without_room(checkpoint: Path) -> None:
    """The next checkpoint is as large as this one: without room for it there is nothing to start for."""
    needed = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    if needed > shutil.disk_usage(checkpoint).free:
        raise OSError(errno.ENOSPC, f"the next checkpoint needs {needed / 1e6:.1f} MB")


def _clear_output(output: Path, store: ArtifactStore, job_id: str, *, keep: str | None) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for entry in output.iterdir():
        if not entry.is_dir():
            entry.unlink()
        elif keep is None or not store.is_stored(job_id, entry.name, entry):
            shutil.rmtree(entry)
