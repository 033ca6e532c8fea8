"""The part of `Client` that reads what jobs produce: their events, logs, curves and checkpoints."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zeta.errors import parse_response
from zeta.job_ids import LAST, resolve_job_id
from zeta.pagination import read_pages
from zeta.request_parts import path_segment
from zeta.service_client import ServiceClient
from zeta_core.contract.errors import ZetaError
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.responses import Curves

if TYPE_CHECKING:
    from zeta.download import Download, DownloadProgress
    from zeta_core.contract.job.checkpoint import Manifest
    from zeta_core.contract.job.comparison import Comparison
    from zeta_core.contract.job.events import Event


class JobOutputs(ServiceClient, ABC):
    """Reads what jobs produce. A job id may be shortened to its beginning, and ``@last`` is the newest job."""

    @abstractmethod
    def jobs(self, *, limit: int | None = 20) -> Sequence[Job]: ...

    @abstractmethod
    def job(self, job_id: str) -> Job: ...

    # --- Events, logs and curves --------------------------------------------------------------------------------------

    def events(
        self,
        job_id: str,
        *,
        after: int = 0,
        timeout_seconds: float | None = None,
        on_interruption: Callable[[ZetaError], None] | None = None,
    ) -> Iterator[Event]:
        """Stream events with ``seq`` greater than ``after``, each once and in order, until the job has ended.

        After a lost connection, the stream reconnects and continues where it stopped; ``on_interruption`` is called
        once per outage. If a gateway buffers the stream, the client polls the stored events instead.
        """
        from zeta import event_stream

        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        return event_stream.follow(
            self._transport, self._id(job_id), after=after, deadline=deadline, on_interruption=on_interruption
        )

    def stored_events(self, job_id: str, *, after: int = 0, limit: int | None = None) -> list[Event]:
        """List the events that are stored now, oldest first."""
        from zeta import event_stream

        return list(event_stream.stored(self._transport, self._id(job_id), after=after, limit=limit))

    def logs(
        self,
        job_id: str,
        *,
        follow: bool = False,
        tail: int | None = None,
        attempt: int | None = None,
        on_interruption: Callable[[ZetaError], None] | None = None,
    ) -> Iterator[str]:
        """The output of the training processes, in pieces as they arrive; with ``follow``, until the job has ended.

        After a lost connection, the stream reconnects and continues where it stopped; ``on_interruption`` is called
        once per outage.
        """
        from zeta.log_stream import LogStream

        log = LogStream(self._transport, self._id(job_id), tail=tail, attempt=attempt)
        return log.follow(on_interruption) if follow else log.read()

    def metrics(self, job_id: str, *, max_points: int | None = None) -> Curves:
        """The job's training curves: arrays of equal length, reduced to ``max_points`` steps if it is given."""
        response = self._transport.request(
            "GET", f"/v1/jobs/{self._id(job_id)}/metrics", params={"max_points": max_points}
        )
        return parse_response(Curves, response)

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    def checkpoints(self, job_id: str) -> list[Manifest]:
        """List the job's checkpoints, newest first."""
        from zeta_core.contract.job.checkpoint import Manifest

        return list(read_pages(self._transport, Manifest, f"/v1/jobs/{self._id(job_id)}/checkpoints", {}, None))

    def checkpoint(self, job_id: str, name: str = "final") -> Manifest:
        """The manifest of ``step-N``, ``best``, ``final`` or ``latest``."""
        from zeta_core.contract.job.checkpoint import Manifest

        return parse_response(
            Manifest, self._transport.request("GET", f"/v1/jobs/{self._id(job_id)}/checkpoints/{path_segment(name)}")
        )

    def compare(self, job_a: str, job_b: str) -> Comparison:
        """Compare two succeeded jobs by their losses on the same held-out documents, with the noise floor.

        Raises `InvalidRequest` if they can't be compared.
        """
        from zeta.document_losses import read_document_losses
        from zeta_core.contract.job.comparison import compare

        a, b = (read_document_losses(self._transport, self.job(job_id)) for job_id in (job_a, job_b))
        return compare(a, b)

    def download(
        self,
        job_id: str,
        checkpoint: str | None = None,
        directory: str | Path | None = None,
        *,
        include: Iterable[str] = (),
        state: bool = False,
        merged: bool = False,
        overwrite: bool = False,
        on_progress: Callable[[DownloadProgress], None] | None = None,
    ) -> Download:
        """Download a checkpoint and verify the SHA-256 of every file. Existing files are not fetched again.

        ``checkpoint`` defaults to the final checkpoint, or the latest if none is final. ``include`` contains glob
        patterns for file paths. ``training_state/`` is included only with ``state``. ``merged`` downloads only the
        merged model of an adapter, as a model directory. `zeta.download` lists the guarantees.
        """
        from zeta.download import download

        job_id = self._id(job_id)
        if checkpoint is None:
            checkpoint = self.job(job_id).final_checkpoint or "latest"
        manifest = self.checkpoint(job_id, checkpoint)
        name = f"{job_id}-{manifest.name}{'-merged' if merged else ''}"
        target = Path(name if directory is None else directory)
        return download(
            self._transport,
            job_id,
            manifest,
            target,
            include=tuple(include),
            state=state,
            merged=merged,
            overwrite=overwrite,
            on_progress=on_progress,
        )

    def _id(self, text: str) -> str:
        """The full job id for ``text``, which may be the beginning of an id, or ``@last``."""
        return resolve_job_id(self, text if text == LAST else path_segment(text))
