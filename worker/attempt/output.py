"""The output of one attempt: journal lines for the server; checkpoints, log and curves for the artifact store."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from worker.artifacts.checkpoint_uploads import CheckpointUploads
from worker.artifacts.job_log import JobLog
from worker.artifacts.output_uploads import OutputUploads
from worker.attempt.journal_reader import JournalReader
from worker.attempt.publisher import Publisher
from worker.attempt.resources import WorkerResources
from worker.run.sandbox import TEMPORARY
from worker.threads import log_failure
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.spec.defaults import num_kept_checkpoints
from zeta_core.contract.wire.run_directory import (
    JOURNAL_FILE,
    LOG_FILE,
    PUBLISHED_FILE,
    RunFile,
    log_key,
    output_directory,
)

logger = logging.getLogger(__name__)


class AttemptOutput:
    """Reads and stores the output of a run, whose journal `publisher` sends to the server. No method blocks."""

    def __init__(
        self,
        resources: WorkerResources,
        run_file: RunFile,
        directory: Path,
        devices: Sequence[str],
        on_progress: Callable[[dict[str, Any]], None],
    ) -> None:
        """``directory`` is the run directory, and ``devices`` are the run's GPUs.

        ``on_progress`` is called with each progress line of the journal.
        """
        settings, store, executor = resources.settings, resources.store, resources.executor
        job_id, attempt = run_file.job_id, run_file.attempt
        self._resources = resources
        self._run_file = run_file
        self._directory = directory
        self._folder = settings.root / output_directory(job_id)
        self._uploads = CheckpointUploads(
            store,
            executor,
            job_id,
            self._folder,
            save_total_limit=num_kept_checkpoints(run_file.spec, run_file.resolved_spec),
        )
        self.journal = JournalReader(directory / JOURNAL_FILE, self._uploads.add, on_progress)
        log = JobLog(
            directory / LOG_FILE,
            store,
            log_key(job_id, attempt, run_file.node_rank),
            max_bytes=settings.log_max_bytes,
        )
        self._archive = OutputUploads(store, executor, job_id, self._folder, log)
        self.publisher = Publisher(
            self.journal,
            self._uploads,
            job_id=job_id,
            attempt=attempt,
            worker=settings.worker_name,
            amend=dict if resources.usage is None else partial(resources.usage.with_usage, devices=devices),
        )
        self._is_opened = True  # the job's folder was created in the store; if it is missing, the job was deleted

    def adopt(self) -> None:
        """Continue the output of an earlier process of this worker."""
        self._is_opened = self._run_file.is_opened

    def collect(self) -> None:
        """Read new journal lines and store the new part of the log."""
        if not self._is_opened:
            # A run prepared by an older worker may have no folder in the store yet; create it before storing anything.
            self._resources.store.open_job(self._run_file.job_id)
            self._is_opened = True
        self.journal.scan()
        self._archive.copy_log()

    def upload_checkpoints(self, *, is_over: bool) -> None:
        """Continue storing checkpoints; ``is_over`` means that no process of the run is left."""
        self._uploads.step(is_over=is_over)

    def finish(self, *, was_started: bool) -> None:
        """All processes have exited: complete the files in the store, then let the last line be published."""
        if not self.publisher.has_only_the_end_left:
            return
        # Only node 0 has written checkpoints; the others may have a copy of the one that they resumed from.
        succeeded = self.journal.last_status == JobStatus.SUCCEEDED and self._run_file.node_rank == 0
        # A run that was never started has no log, and must not wait for a hanging store.
        if not was_started or self._archive.complete(succeeded=succeeded, keep=self._uploads.keep):
            self.publisher.release_end()

    def remove_local_files(self) -> None:
        """Mark the run as published and remove its output; the store has everything that a later attempt needs."""
        if self._directory.is_dir():
            (self._directory / PUBLISHED_FILE).touch()
            temporary = self._directory / TEMPORARY
            work = self._resources.executor.submit(shutil.rmtree, temporary, ignore_errors=True)
            log_failure(work, f"The temporary files in {temporary} could not be removed")
        if self._folder.is_dir():
            doomed = self._folder.with_name(f"doomed-{self._run_file.attempt}")
            # Renamed first, so that the next attempt here doesn't see files that are being removed.
            self._folder.rename(doomed)
            work = self._resources.executor.submit(shutil.rmtree, doomed)
            log_failure(work, f"The local files of {self._run_file.job_id} in {doomed} could not be removed")
