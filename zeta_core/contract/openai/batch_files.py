"""The files of a batch: one request per line in, one answer or error per line out (JSON Lines, as OpenAI defines them).

| file   | line                                                                                                |
|--------|-----------------------------------------------------------------------------------------------------|
| input  | ``{"custom_id", "method": "POST", "url", "body"}``                                                  |
| output | ``{"id", "custom_id", "response": {"status_code": 200, "request_id", "body"}, "error": null}``      |
| errors | the same, with the status code and the error object of the failed request                          |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, get_args

from pydantic import Field, JsonValue

from zeta_core.contract.errors import ErrorDetail, InvalidRequest, ZetaError
from zeta_core.contract.openai.answer_parameters import AnswerQuery, chat_query, text_query
from zeta_core.contract.spec.validation import StrictModel, parse, shown
from zeta_core.contract.strict_json import JsonFault, read_json
from zeta_core.contract.wire.answers import Failure

BatchEndpoint = Literal["/v1/chat/completions", "/v1/completions"]
ENDPOINTS: tuple[BatchEndpoint, ...] = get_args(BatchEndpoint)
MAX_REQUESTS = 50_000
MAX_INPUT_BYTES = 200 * 10**6
MAX_LINE_BYTES = 2**20  # parsing JSON blocks the whole process
MAX_LINES = 2 * MAX_REQUESTS  # with empty ones
MAX_FAULTS = 1000
MAX_CUSTOM_ID = 512  # characters

OUTPUT_FILE, ERROR_FILE = "output.jsonl", "errors.jsonl"  # in the checkpoint `final` of a batch job


class RequestLine(StrictModel):
    """A line of the input file."""

    custom_id: str = Field(min_length=1, max_length=MAX_CUSTOM_ID)
    method: Literal["POST"]
    url: str
    body: dict[str, JsonValue]


@dataclass(frozen=True)
class BatchRequest:
    """A valid request; ``row`` counts the requests of the file from 0."""

    row: int
    custom_id: str
    query: AnswerQuery


@dataclass(frozen=True)
class InputFile:
    """The number of requests of an input file, their model, and one detail for each fault of the invalid ones.

    ``requests`` has the valid ones, in order, if they were to be kept.
    """

    num_requests: int
    model: str | None
    requests: list[BatchRequest]
    faults: list[ErrorDetail]


def read_input(file: BinaryIO, endpoint: BatchEndpoint, *, keep_requests: bool = True) -> InputFile:
    """Check every line of an input file, until it exceeds a limit. Empty lines are skipped."""
    requests: list[BatchRequest] = []
    faults: list[ErrorDetail] = []
    first_lines: dict[str, int] = {}  # by custom_id
    model: str | None = None
    row = 0
    for number, content in enumerate(_lines(file), start=1):
        is_empty = not content.strip()
        if (exceeded := _exceeded_limit(number, 0 if is_empty else row, len(faults))) is not None:
            faults.insert(0, exceeded)
            break
        if is_empty:
            continue
        try:
            line, query = _read_line(content, endpoint)
            if (first := first_lines.setdefault(line.custom_id, number)) != number:
                raise InvalidRequest(
                    f"custom_id is {shown(line.custom_id)}, as in line {first}; use each once.", param="custom_id"
                )
            model = model or query.model
            if query.model != model:
                raise InvalidRequest(
                    f"model is {shown(query.model)}, but the first request names {shown(model)}; use one model per "
                    "file.",
                    param="body.model",
                )
            if keep_requests:
                requests.append(BatchRequest(row, line.custom_id, query))
        except ZetaError as error:
            faults += _faults_of_line(number, error)
        row += 1
    if not row and not faults:
        faults.append(ErrorDetail(message="The file has no requests; write one per line.", code="empty_file"))
    return InputFile(row, model, requests, faults)


def answer_line(job_id: str, request: BatchRequest, body: dict[str, Any]) -> bytes:
    """The line of the output file for the body of a response."""
    return _result_line(job_id, request, 200, body)


def failure_line(job_id: str, request: BatchRequest, failure: Failure) -> bytes:
    """The line of the error file for a request that the model can't answer."""
    error = {
        "message": failure.message,
        "type": "invalid_request_error",
        "param": failure.param,
        "code": failure.code,
    }
    return _result_line(job_id, request, 400, {"error": error})


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of the file; the rest of a line that is too long is skipped."""
    while content := file.readline(MAX_LINE_BYTES + 1):
        yield content
        while len(content) > MAX_LINE_BYTES and not content.endswith(b"\n"):
            content = file.readline(MAX_LINE_BYTES + 1)


def _exceeded_limit(number: int, row: int, num_faults: int) -> ErrorDetail | None:
    """Why the line ``number``, after ``row`` requests, is not read any more."""
    if row >= MAX_REQUESTS:
        message = f"The file has more than {MAX_REQUESTS:,} requests, the limit of a batch. Split the file."
        return ErrorDetail(message=message, code="too_many_requests")
    if number > MAX_LINES:
        message = f"The file has more than {MAX_LINES:,} lines, the limit of a batch; remove empty lines."
        return ErrorDetail(message=message, code="too_many_lines")
    if num_faults >= MAX_FAULTS:
        message = f"The lines from {number:,} on were not checked, because the file has {num_faults:,} faults."
        return ErrorDetail(message=message, code="too_many_faults")
    return None


def _read_line(content: bytes, endpoint: BatchEndpoint) -> tuple[RequestLine, AnswerQuery]:
    """Raises subclasses of `ZetaError`."""
    if len(content) > MAX_LINE_BYTES:
        raise InvalidRequest(f"The line has more than {MAX_LINE_BYTES:,} bytes, the limit.", code="line_too_long")
    try:
        value = read_json(content.rstrip(b"\r\n"))
    except JsonFault as fault:
        raise InvalidRequest(f"{fault.subject or 'It'} {fault.reason}.", code=fault.code, param=fault.param) from fault
    line = parse(RequestLine, value, error_class=InvalidRequest)
    if line.url != endpoint:
        raise InvalidRequest(
            f"url is {shown(line.url)}, but the endpoint of the batch is {endpoint!r}; use that.", param="url"
        )
    query = chat_query(line.body) if endpoint == "/v1/chat/completions" else text_query(line.body)
    if query.stream:
        raise InvalidRequest("body.stream is true, but a batch writes whole answers; remove it.", param="body.stream")
    return line, query


def _faults_of_line(number: int, error: ZetaError) -> list[ErrorDetail]:
    """The faults of one line, with its number."""
    details = error.details or (ErrorDetail(param=error.param, message=error.message, code=error.code),)
    return [detail.model_copy(update={"message": f"Line {number}: {detail.message}"}) for detail in details]


def _result_line(job_id: str, request: BatchRequest, status: int, body: dict[str, Any]) -> bytes:
    number = hashlib.sha256(f"{job_id}/{request.row}".encode()).hexdigest()[:24]  # the same in every attempt
    line = {
        "id": f"batch_req_{number}",
        "custom_id": request.custom_id,
        "response": {"status_code": status, "request_id": f"req_{number}", "body": body},
        "error": None,
    }
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
