"""The HTTP client of the service: its methods are the API's, its answers the contract's own models.

    with Client() as client:
        job = client.submit({"model": {"config": {"model_type": "llama"}}, "dataset": {"builtin": "python-docs"}})
        job = client.wait(job.id)
        client.download(job.id, directory="model")

A job's id may be shortened to its beginning, and ``@last`` is the newest job; a spec may name local files and folders.
Every failure is a `ZetaError` with the server's sentence, or `Unreachable`. A submission carries an
``Idempotency-Key`` of its own, so that a retry after a lost answer never makes a second job.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx
from pydantic import BaseModel

from zeta import download, event_stream, log_stream, upload
from zeta.errors import BadAnswer, Unreachable, read_answer
from zeta.job_ids import LAST, full_id, with_full_job
from zeta.local_inputs import upload_local
from zeta.settings import environment, find_server
from zeta.transport import Transport
from zeta_core.contract.answers import DeletedObject, FilePurpose, Page, StoredFile, Worker
from zeta_core.contract.checkpoint import Manifest
from zeta_core.contract.commands import FROM_START
from zeta_core.contract.errors import InvalidRequest, ZetaError
from zeta_core.contract.estimate import Estimate
from zeta_core.contract.events import Event
from zeta_core.contract.job import ENDED, Job, JobStatus
from zeta_core.contract.spec import JobSpec

PATIENCE_SECONDS = 5.0  # a server that restarts is back within this
PAGE_SIZE = 1000

AnswerT = TypeVar("AnswerT", bound=BaseModel)


class Client:
    """One service, one key. Without arguments it finds them as the command line does (see `zeta.settings`)."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        use_proxy: bool = True,
    ) -> None:
        """``patience_seconds``: how long a request is repeated while nothing answers. ``use_proxy=False``: connect
        directly, whatever proxy the environment names; this machine's own server is always reached directly.

        Raises `Unreachable` where no server is named and none runs here, `InvalidSettings` where a setting of the
        environment is wrong.
        """
        variables = environment()
        target = find_server(variables, url=base_url, api_key=api_key)
        if target is None:
            raise Unreachable(
                "No Zeta server is known here; start one with `zeta up`, or name one with ZETA_URL or `zeta login URL`."
            )
        self.base_url = target.url
        self._transport = Transport(
            target.url,
            target.api_key,
            patience_seconds=patience_seconds,
            variables=variables,
            use_proxy=use_proxy and not target.is_local,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._transport.close()

    # --- Jobs ---------------------------------------------------------------------------------------------------------

    def submit(
        self,
        spec: JobSpec | Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        on_upload: Callable[[str], None] = lambda _: None,
    ) -> Job:
        """Create a job. A mapping may name local files and folders, which are uploaded first (`zeta.local_inputs`).

        ``on_upload`` receives a sentence for each upload. Raises `InvalidSpec` naming every bad field.
        """
        return self._create("/v1/jobs", self._sent(spec, on_upload), idempotency_key)

    def validate(
        self, spec: JobSpec | Mapping[str, Any], *, on_upload: Callable[[str], None] = lambda _: None
    ) -> Estimate:
        """The checks of `submit` without a job, and what is known of it before it runs."""
        headers = {"Content-Type": "application/json"}
        body = _json(self._sent(spec, on_upload))
        return read_answer(
            Estimate, self._transport.request("POST", "/v1/jobs/validate", content=body, headers=headers)
        )

    def jobs(
        self,
        *,
        status: JobStatus | str | None = None,
        entity_name: str | None = None,
        metadata: Mapping[str, str] | None = None,
        limit: int | None = 20,
    ) -> list[Job]:
        """The newest jobs first; ``limit=None`` is all of them."""
        params: dict[str, Any] = {"status": None if status is None else str(status), "entity_name": entity_name}
        params |= {f"metadata[{name}]": value for name, value in (metadata or {}).items()}
        return list(self._pages(Job, "/v1/jobs", params, limit))

    def job(self, job_id: str) -> Job:
        return read_answer(Job, self._transport.request("GET", f"/v1/jobs/{self._id(job_id)}"))

    def cancel(self, job_id: str) -> Job:
        """Ask for the job's end; `wait` returns when nothing of it is left."""
        return self._command(job_id, "cancel")

    def pause(self, job_id: str) -> Job:
        """Ask a job to save a checkpoint and to free its device; its status is ``paused`` when it has."""
        return self._command(job_id, "pause")

    def resume(self, job_id: str) -> Job:
        """Queue a paused job again, to go on from its newest checkpoint."""
        return self._command(job_id, "resume")

    def rerun(
        self,
        job_id: str,
        patch: Mapping[str, Any] | None = None,
        *,
        from_checkpoint: str = FROM_START,
        idempotency_key: str | None = None,
    ) -> Job:
        """A new job out of this one's spec under a JSON merge patch, in which ``None`` removes a field.

        ``from_checkpoint`` is ``start``, ``latest`` or ``step-N``; what a resumed run may have different is held by
        the server. Raises `InvalidSpec` naming every bad field.
        """
        body = {"patch": dict(patch or {}), "from": from_checkpoint}
        return self._create(f"/v1/jobs/{self._id(job_id)}/rerun", body, idempotency_key)

    def delete(self, job_id: str) -> DeletedObject:
        """Delete an ended job with its artifacts."""
        return read_answer(DeletedObject, self._transport.request("DELETE", f"/v1/jobs/{self._id(job_id)}"))

    def wait(
        self,
        job_id: str,
        *,
        timeout_seconds: float | None = None,
        on_event: Callable[[Event], None] | None = None,
        on_interruption: Callable[[ZetaError], None] | None = None,
    ) -> Job:
        """Return the job when it has ended, over restarts of the server. Raises `WaitTimeout` after the time-out."""
        job_id = self._id(job_id)
        for event in self.events(job_id, timeout_seconds=timeout_seconds, on_interruption=on_interruption):
            if on_event is not None:
                on_event(event)
        job = self.job(job_id)
        if job.status not in ENDED:
            raise BadAnswer(f"The server ended the events of {job_id}, which is {job.status}.")
        return job

    def events(
        self,
        job_id: str,
        *,
        after: int = 0,
        timeout_seconds: float | None = None,
        on_interruption: Callable[[ZetaError], None] | None = None,
    ) -> Iterator[Event]:
        """Events with ``seq`` above ``after``, live, each once and in order, until the job has ended.

        A lost connection is made again and continues where it stopped; ``on_interruption`` is called for each outage.
        Where a gateway holds the stream back, the stored events are polled instead.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        return event_stream.follow(
            self._transport, self._id(job_id), after=after, deadline=deadline, on_interruption=on_interruption
        )

    def stored_events(self, job_id: str, *, after: int = 0, limit: int | None = None) -> list[Event]:
        """The events that are there now, oldest first."""
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
        """The text that the training processes wrote, in pieces as they arrive; ``follow`` until the job has ended.

        A stream that breaks, or ends while the job continues, is made again and continues where it stopped;
        ``on_interruption`` is called for each outage.
        """
        log = log_stream.Log(self._transport, self._id(job_id), tail=tail, attempt=attempt)
        return log.follow(on_interruption) if follow else log.read()

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    def checkpoints(self, job_id: str) -> list[Manifest]:
        """The job's checkpoints, newest first."""
        return list(self._pages(Manifest, f"/v1/jobs/{self._id(job_id)}/checkpoints", {}, None))

    def checkpoint(self, job_id: str, name: str = "final") -> Manifest:
        """The manifest of ``step-N``, ``best``, ``final`` or ``latest``."""
        return read_answer(
            Manifest, self._transport.request("GET", f"/v1/jobs/{self._id(job_id)}/checkpoints/{_part(name)}")
        )

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
        on_progress: Callable[[download.Progress], None] | None = None,
    ) -> download.Download:
        """Bring a checkpoint here, every file verified by its SHA-256; what is here already is not fetched again.

        ``checkpoint`` unset is the final one, or the latest while there is no final one. ``include`` are globs over
        the files' paths; ``training_state/`` comes with ``state`` only. ``merged`` brings the merged model of an
        adapter alone, as a model directory. See `zeta.download` for what is guaranteed.
        """
        job_id = self._id(job_id)
        if checkpoint is None:
            checkpoint = self.job(job_id).final_checkpoint or "latest"
        manifest = self.checkpoint(job_id, checkpoint)
        name = f"{job_id}-{manifest.name}{'-merged' if merged else ''}"
        target = Path(name if directory is None else directory)
        return download.download(
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

    # --- Files and workers --------------------------------------------------------------------------------------------

    def upload(
        self,
        path: str | Path,
        purpose: FilePurpose = "dataset",
        *,
        on_bytes: Callable[[int, int], None] | None = None,
    ) -> StoredFile:
        """Store a file, streamed from the disk; bytes that the service has already are not sent again.

        ``on_bytes`` is told the bytes sent and the file's size.
        """
        return upload.upload(self._transport, Path(path), purpose, on_bytes=on_bytes)

    def files(self, *, sha256: str | None = None, limit: int | None = 20) -> list[StoredFile]:
        return list(self._pages(StoredFile, "/v1/files", {"sha256": sha256}, limit))

    def workers(self) -> list[Worker]:
        return list(self._pages(Worker, "/v1/workers", {}, None))

    def drain(self, worker: str, *, draining: bool = True) -> Worker:
        """Have a worker hand back its jobs and get no new ones, or (``draining=False``) work again; admin only."""
        word = "drain" if draining else "undrain"
        return read_answer(Worker, self._transport.request("POST", f"/v1/workers/{quote(worker, safe='')}/{word}"))

    def is_ready(self) -> bool:
        """Whether the service says that it is ready for jobs; nothing is retried."""
        try:
            with self._transport.stream("GET", "/readyz", read_seconds=5.0):
                return True
        except (httpx.TransportError, ZetaError):
            return False

    def _sent(self, spec: JobSpec | Mapping[str, Any], on_upload: Callable[[str], None]) -> dict[str, Any]:
        """The spec as the server reads it: a `JobSpec` is sent as it is, of a mapping local paths are uploaded."""
        if isinstance(spec, JobSpec):
            return spec.model_dump(mode="json", exclude_unset=True)
        return upload_local(with_full_job(self, dict(spec)), self.upload, on_upload)

    def _id(self, text: str) -> str:
        """The whole id of the job that ``text`` means: also the beginning of an id, or ``@last``."""
        return full_id(self, text if text == LAST else _part(text))

    def _command(self, job_id: str, command: str) -> Job:
        return read_answer(Job, self._transport.request("POST", f"/v1/jobs/{self._id(job_id)}/{command}"))

    def _create(self, path: str, sent: Mapping[str, Any], idempotency_key: str | None) -> Job:
        key = idempotency_key or str(uuid4())
        if not (key.isascii() and key.isprintable()):
            raise InvalidRequest(f"idempotency_key is {key!r}; use printable ASCII, as an HTTP header carries it.")
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        return read_answer(Job, self._transport.request("POST", path, content=_json(sent), headers=headers))

    def _pages(
        self, model: type[AnswerT], path: str, params: Mapping[str, Any], limit: int | None
    ) -> Iterator[AnswerT]:
        after: str | None = None
        left = limit
        while left is None or left > 0:
            size = PAGE_SIZE if left is None else min(left, PAGE_SIZE)
            response = self._transport.request("GET", path, params={**params, "limit": size, "after": after})
            page = read_answer(Page[model], response)
            yield from page.data
            if not page.has_more or page.last_id is None:
                return
            after = page.last_id
            left = None if left is None else left - len(page.data)


def _json(sent: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(sent, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"The spec cannot be written as JSON: {error}. Use JSON's own types.") from error


def _part(text: str) -> str:
    """One segment of a path, which no id or name can leave."""
    if not text or not all(sign.isascii() and (sign.isalnum() or sign in "_-.") for sign in text) or ".." in text:
        raise InvalidRequest(f"{text!r} is no id or checkpoint name; `zeta jobs` and `zeta checkpoints` list them.")
    return text
