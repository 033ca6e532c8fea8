"""Creates fine-tuning jobs from requests of the `openai` client."""

from __future__ import annotations

from functools import partial
from typing import Any

from sqlalchemy import select

from server.auth import Caller
from server.database.file_tables import FileRow
from server.estimates import estimate
from server.openai.few_examples import few_examples_warning
from server.openai.fine_tuning_request import FineTuningRequest, reject_reinforcement
from server.openai.model_names import resolve_model
from server.openai.repeated_requests import RepeatedRequests
from server.openai.translation import Translation, in_terms_of_the_request, translate
from server.service import Service
from server.submitting.submissions import SubmissionOrigin, Submissions
from zeta_core.contract.errors import ErrorDetail, InvalidRequest, InvalidSpec
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.spec.validation import error_from_details, parse, shown


class FineTuning:
    """Creates the fine-tuning jobs of one server process."""

    def __init__(self, service: Service, submissions: Submissions) -> None:
        self._service = service
        self._submissions = submissions
        self._requests = RepeatedRequests(service, "openai")

    async def create(self, caller: Caller, body: Any, *, attempt: int, idempotency_key: str | None) -> str:
        """The id of the new job, or of the one that an earlier attempt of this request has created.

        ``attempt`` is the number of the client's retries so far. Raises subclasses of `InvalidRequest`, and `NotFound`
        for an unknown model.
        """
        return await self._requests.create(
            caller, body, partial(self._create, caller, body), attempt=attempt, idempotency_key=idempotency_key
        )

    async def _create(self, caller: Caller, body: Any, idempotency_key: str) -> str:
        reject_reinforcement(body)
        request = parse(FineTuningRequest, body)
        translation, files = await self._translate(caller, request)
        try:
            await estimate.validate(self._service, caller, translation.spec)
            warning = await few_examples_warning(self._service.artifacts, files)
            origin = SubmissionOrigin(
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
        kind = "a batch of requests" if row.purpose == "batch" else "a model"
        message = f"{param} is {file_id!r}, which is {kind} and not data; use a file with purpose 'fine-tune'."
        return ErrorDetail(param=param, message=message, code="wrong_purpose")
    return None
