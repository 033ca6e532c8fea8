"""The HTTP client of the service. Each method calls one route of the API and returns models of the contract.

    with Client() as client:
        job = client.submit({"model": {"config": {"model_type": "llama"}}, "dataset": {"builtin": "python-docs"}})
        job = client.wait(job.id)
        client.download(job.id, directory="model")

A job id may be shortened to its beginning, and ``@last`` is the newest job. A spec may name local files and folders.
Failures raise a `ZetaError` with the server's message, or `Unreachable`. Each submission has its own
``Idempotency-Key``, so a retry after a lost response never creates a second job.

A command line starts a client for every command, so a method imports what only it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from zeta.client_job import ClientJob, require_ended
from zeta.errors import parse_response
from zeta.job_ids import with_full_job
from zeta.job_outputs import JobOutputs
from zeta.pagination import read_pages
from zeta.request_parts import creation_headers, json_body
from zeta_core.contract.errors import ZetaError
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.job.commands import FROM_START
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.job.responses import DeletedObject
from zeta_core.contract.job.status import JobStatus

if TYPE_CHECKING:
    from zeta.chat import Answer, ChatMessage
    from zeta.lineage import ModelLineage
    from zeta.named_models import NamedModels
    from zeta.sweeps import Sweeps
    from zeta_core.contract.job.estimate import Estimate
    from zeta_core.contract.job.events import Event
    from zeta_core.contract.job.order import JobSort
    from zeta_core.contract.spec.job_spec import JobSpec


class Client(JobOutputs):
    """A client for one service with one API key, found by default as described in `zeta.server_lookup`."""

    @property
    def sweeps(self) -> Sweeps:
        """Creating, reading and cancelling sweeps: jobs with the same spec except for some settings."""
        from zeta.sweeps import Sweeps

        return Sweeps(self._transport, self._spec_body)

    @property
    def models(self) -> NamedModels:
        """Naming base models for the `openai` client."""
        from zeta.named_models import NamedModels

        return NamedModels(self._transport, self._spec_body)

    # --- Jobs ---------------------------------------------------------------------------------------------------------

    def submit(
        self,
        spec: JobSpec | Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        on_upload: Callable[[str], None] = lambda _: None,
    ) -> ClientJob:
        """Create a job. A mapping may name local files and folders, which are uploaded first (`zeta.local_inputs`).

        ``on_upload`` is called with a message for each upload. Raises `InvalidSpec` naming every invalid field.
        """
        return self._create("/v1/jobs", self._spec_body(spec, on_upload), idempotency_key)

    def validate(
        self, spec: JobSpec | Mapping[str, Any], *, on_upload: Callable[[str], None] = lambda _: None
    ) -> Estimate:
        """Check a spec as `submit` does, and estimate its cost, without creating a job."""
        from zeta_core.contract.job.estimate import Estimate

        headers = {"Content-Type": "application/json"}
        body = json_body(self._spec_body(spec, on_upload))
        return parse_response(
            Estimate, self._transport.request("POST", "/v1/jobs/validate", content=body, headers=headers)
        )

    def import_openai_job(
        self,
        exported: Mapping[str, Any],
        data: str | Path | None = None,
        *,
        validation_data: str | Path | None = None,
        on_upload: Callable[[str], None] = lambda _: None,
    ) -> tuple[ClientJob, dict[str, Any]]:
        """Create a job from an exported fine-tuning job of OpenAI, and its training and validation files.

        Returns the job, and the settings of the exported job that are not imported. Raises `NotFound` if the job's
        model has no name here, and `InvalidRequest` naming every invalid setting.
        """
        from zeta.openai_import import import_job

        job_id, not_imported = import_job(
            self._transport,
            self.upload,
            exported,
            data=None if data is None else Path(data),
            validation_data=None if validation_data is None else Path(validation_data),
            on_upload=on_upload,
        )
        return self.job(job_id), not_imported

    def jobs(
        self,
        *,
        status: JobStatus | str | None = None,
        entity_name: str | None = None,
        kind: JobKind | str | None = None,
        metadata: Mapping[str, str] | None = None,
        sort: JobSort | None = None,
        limit: int | None = 20,
    ) -> list[ClientJob]:
        """List jobs, newest first or in the order of ``sort``; ``limit=None`` lists all of them.

        ``sort`` is a field, descending with a minus, such as ``-progress``. Jobs without a value come last.
        """
        params: dict[str, Any] = {"status": None if status is None else str(status), "entity_name": entity_name}
        params |= {"kind": None if kind is None else str(kind), "sort": sort}
        params |= {f"metadata[{name}]": value for name, value in (metadata or {}).items()}
        return [job.of(self) for job in read_pages(self._transport, ClientJob, "/v1/jobs", params, limit)]

    def job(self, job_id: str) -> ClientJob:
        """Read a job. Raises `NotFound`."""
        return self._job(self._transport.request("GET", f"/v1/jobs/{self._id(job_id)}"))

    def cancel(self, job_id: str) -> ClientJob:
        """Request cancellation of a job; `wait` returns when its processes have ended."""
        return self._command(job_id, "cancel")

    def pause(self, job_id: str) -> ClientJob:
        """Ask a job to save a checkpoint and free its device; its status then changes to ``paused``."""
        return self._command(job_id, "pause")

    def resume(self, job_id: str) -> ClientJob:
        """Queue a paused job again; it continues from its newest checkpoint."""
        return self._command(job_id, "resume")

    def save_checkpoint(self, job_id: str) -> ClientJob:
        """Ask a running job to save a checkpoint after its current step; it continues."""
        return self._command(job_id, "checkpoint")

    def rerun(
        self,
        job_id: str,
        patch: Mapping[str, Any] | None = None,
        *,
        from_checkpoint: str = FROM_START,
        idempotency_key: str | None = None,
    ) -> ClientJob:
        """Create a job from this job's spec and a JSON merge patch, in which ``None`` removes a field.

        ``from_checkpoint`` is ``start``, ``latest`` or ``step-N``. The server restricts which fields may change when
        continuing from a checkpoint. Raises `InvalidSpec` naming every invalid field.
        """
        body = {"patch": dict(patch or {}), "from": from_checkpoint}
        return self._create(f"/v1/jobs/{self._id(job_id)}/rerun", body, idempotency_key)

    def export(
        self,
        job_id: str,
        to: str,
        *,
        type: str | None = None,
        checkpoint: str = "final",
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> ClientJob:
        """Create a job that exports a checkpoint to ``merged``, ``adapter`` or ``gguf``; `download` gets its files.

        ``fields`` are further ones of `ExportRequest`. Raises `InvalidSpec` naming every invalid field.
        """
        body = {"to": to, "checkpoint": checkpoint, **fields}
        body |= {} if type is None else {"type": type}
        return self._create(f"/v1/jobs/{self._id(job_id)}/exports", body, idempotency_key)

    def exports(self, job_id: str, *, limit: int | None = 20) -> list[ClientJob]:
        """List the exports of a job, newest first."""
        path = f"/v1/jobs/{self._id(job_id)}/exports"
        return [job.of(self) for job in read_pages(self._transport, ClientJob, path, {}, limit)]

    def evaluate(
        self,
        job_id: str,
        file: str | Path,
        *,
        checkpoint: str = "final",
        base: bool = False,
        entity_name: str | None = None,
        idempotency_key: str | None = None,
    ) -> ClientJob:
        """Create a job that evaluates a checkpoint on a data file, which is uploaded unless it is the id of a file.

        With ``base``, the model that the job started from is evaluated, too. The job's ``result.evaluation`` has the
        scores. Raises `InvalidRequest` naming the invalid field.
        """
        path = f"/v1/jobs/{self._id(job_id)}/evaluations"
        file_id = file if isinstance(file, str) and is_id(file, "file") else self.upload(file).id
        body = {"file": file_id, "checkpoint": checkpoint, "base": base, "entity_name": entity_name}
        return self._create(path, body, idempotency_key)

    def delete(self, job_id: str) -> DeletedObject:
        """Delete an ended job with its artifacts."""
        return parse_response(DeletedObject, self._transport.request("DELETE", f"/v1/jobs/{self._id(job_id)}"))

    def wait(
        self,
        job_id: str,
        *,
        timeout_seconds: float | None = None,
        on_event: Callable[[Event], None] | None = None,
        on_interruption: Callable[[ZetaError], None] | None = None,
    ) -> ClientJob:
        """Wait until the job has ended, even if the server restarts, and return it.

        Raises `WaitTimeout` after ``timeout_seconds``.
        """
        job_id = self._id(job_id)
        for event in self.events(job_id, timeout_seconds=timeout_seconds, on_interruption=on_interruption):
            if on_event is not None:
                on_event(event)
        return require_ended(self.job(job_id))

    # --- Answers ------------------------------------------------------------------------------------------------------

    def ask(
        self,
        model: str,
        prompt: Sequence[ChatMessage] | str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Ask a checkpoint (``job_...``, ``job_.../step-N``), a job's base (``job_.../base``) or a named base model.

        ``prompt`` is a conversation, or a text to continue. ``on_text`` is called with each piece of the answer.
        Raises `Unavailable` if no device is free now. The official `openai` client has all further parameters.
        """
        from zeta import chat

        options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        return chat.ask(self._transport, model, prompt, options, on_text or (lambda _: None))

    def files_of_job(self, job_id: str) -> ModelLineage:
        """List the files that a job's model saw, also through the checkpoints that it starts from."""
        from zeta.lineage import files_of_job

        return files_of_job(self, self._id(job_id))

    def _spec_body(self, spec: JobSpec | Mapping[str, Any], on_upload: Callable[[str], None]) -> dict[str, Any]:
        """The spec to send. A `JobSpec` is sent unchanged; local paths in a mapping are uploaded first."""
        from zeta.local_inputs import upload_local
        from zeta_core.contract.spec.job_spec import JobSpec

        if isinstance(spec, JobSpec):
            return spec.model_dump(mode="json", exclude_unset=True)
        return upload_local(with_full_job(self, dict(spec)), self.upload, on_upload)

    def _command(self, job_id: str, command: str) -> ClientJob:
        return self._job(self._transport.request("POST", f"/v1/jobs/{self._id(job_id)}/{command}"))

    def _create(self, path: str, sent: Mapping[str, Any], idempotency_key: str | None) -> ClientJob:
        headers = creation_headers(idempotency_key)
        return self._job(self._transport.request("POST", path, content=json_body(sent), headers=headers))

    def _job(self, response: httpx.Response) -> ClientJob:
        return parse_response(ClientJob, response).of(self)
