"""Creates fine-tuning jobs. A repeated request whose first response was lost returns the job that it created.

The client sends no idempotency key, but the number of its attempt in ``x-stainless-retry-count``. The first attempt
always creates a job, so two equal jobs can be created on purpose. A later attempt returns the newest job that the same
API key created from an equal body within `RETRY_SECONDS`, after waiting for earlier attempts that this server is still
processing. If two equal jobs are created within that time, a retry of the first request may return the second job; an
``Idempotency-Key`` header makes requests exact.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from sqlalchemy import select

from server.auth import Caller
from server.database.tables import FileRow, IdempotencyRow
from server.estimates import estimate
from server.openai.few_examples import few_examples_warning
from server.openai.fine_tuning_request import FineTuningRequest, reject_reinforcement
from server.openai.model_names import resolve_model
from server.openai.translation import Translation, in_terms_of_the_request, translate
from server.service import Service
from server.submitting.submissions import Origin, Submissions
from zeta_core.contract.errors import ErrorDetail, InvalidRequest, InvalidSpec
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.spec.validation import error_from_details, parse, shown

RETRY_SECONDS = 900.0  # longer than the client's timeout of 600 s and its longest wait of 120 s before a retry
_PREFIX = "openai"  # of idempotency keys

_Request = tuple[str, str, str]  # the project, the API key and the digest of the body


class FineTuning:
    """Creates the fine-tuning jobs of one server process."""

    def __init__(self, service: Service, submissions: Submissions) -> None:
        self._service = service
        self._submissions = submissions
        self._in_progress: dict[_Request, set[asyncio.Event]] = defaultdict(set)

    async def create(self, caller: Caller, body: Any, *, attempt: int, idempotency_key: str | None) -> str:
        """The id of the new job, or of the one that an earlier attempt of this request has created.

        ``attempt`` is the number of the client's retries so far. Raises subclasses of `InvalidRequest`, and `NotFound`
        for an unknown model.
        """
        digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        request = (caller.project, caller.key_id, digest)
        if idempotency_key is None:
            if attempt > 0 and (earlier := await self._earlier_job(request)) is not None:
                return earlier
            idempotency_key = f"{_PREFIX}:{digest}:{secrets.token_hex(8)}"
        with self._progressing(request):
            return await self._create(caller, body, idempotency_key)

    async def _earlier_job(self, request: _Request) -> str | None:
        """The newest job of an earlier attempt, once the attempts in progress are complete."""
        while self._in_progress[request]:
            await next(iter(self._in_progress[request])).wait()
        self._in_progress.pop(request, None)
        project, key_id, digest = request
        query = select(IdempotencyRow.job_id).where(
            IdempotencyRow.project == project,
            IdempotencyRow.key_id == key_id,
            IdempotencyRow.idempotency_key.startswith(f"{_PREFIX}:{digest}:", autoescape=True),
            IdempotencyRow.created_at >= utc_now() - timedelta(seconds=RETRY_SECONDS),
        )
        async with self._service.database.read() as session:
            return await session.scalar(query.order_by(IdempotencyRow.created_at.desc()).limit(1))

    @contextmanager
    def _progressing(self, request: _Request) -> Generator[None]:
        done = asyncio.Event()
        self._in_progress[request].add(done)
        try:
            yield
        finally:
            done.set()
            self._in_progress[request].discard(done)
            if not self._in_progress[request]:
                del self._in_progress[request]

    async def _create(self, caller: Caller, body: Any, idempotency_key: str) -> str:
        reject_reinforcement(body)
        request = parse(FineTuningRequest, body)
        translation, files = await self._translate(caller, request)
        try:
            await estimate.validate(self._service, caller, translation.spec)
            warning = await few_examples_warning(self._service.store, files)
            origin = Origin(
                openai_request={"model": request.model, "base_learning_rate": translation.base_learning_rate},
                warnings=[warning] if warning is not None else [],
            )
            job, _ = await self._submissions.submit(caller, translation.spec, idempotency_key, origin)
        except InvalidSpec as error:
            raise in_terms_of_the_request(error) from error
        return job.id

    async def _translate(self, caller: Caller, request: FineTuningRequest) -> tuple[Translation, list[FileRow]]:
        """The spec, and the rows of the training file and the validation file."""
        named = {"training_file": request.training_file, "validation_file": request.validation_file}
        given = {param: file_id for param, file_id in named.items() if file_id is not None}
        async with self._service.database.read() as session:
            model = await resolve_model(session, self._service, caller, request.model)
            ids = [file_id for file_id in given.values() if is_id(file_id, "file")]
            query = select(FileRow).where(FileRow.id.in_(ids), FileRow.project == caller.project)
            rows = {row.id: row for row in await session.scalars(query)}
        details = [
            detail for param, file_id in given.items() if (detail := _file_fault(param, file_id, rows)) is not None
        ]
        if details:
            raise error_from_details(details, InvalidRequest)
        try:
            return translate(request, model), [rows[file_id] for file_id in given.values()]
        except InvalidSpec as error:
            raise in_terms_of_the_request(error) from error


def _file_fault(param: str, file_id: str, rows: dict[str, FileRow]) -> ErrorDetail | None:
    row = rows.get(file_id)
    if row is None:
        fix = "upload it with client.files.create(file=..., purpose='fine-tune')"
        message = f"{param} is {shown(file_id)}, which does not exist; {fix}."
        return ErrorDetail(param=param, message=message, code="file_not_found")
    if row.purpose != "dataset":
        message = f"{param} is {file_id!r}, which is a model and not data; use a file with purpose 'fine-tune'."
        return ErrorDetail(param=param, message=message, code="wrong_purpose")
    return None
