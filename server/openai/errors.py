"""Errors in OpenAI's format: ``{"error": {"message", "type", "param", "code"}}``, with the statuses that its API uses.

The status determines the client's exception class; ``x-should-retry`` and ``Retry-After`` determine whether it repeats
a request. Requests that would fail again are not repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict

from server.http.error_responses import STATUS_OF_TYPE, error_response
from server.http.query_parameters import parameter_error
from zeta_core.contract.errors import ZetaError

MAX_RETRY_AFTER_SECONDS = 120  # the client does not repeat a request that has to wait for longer
_PERMANENT = frozenset({409, 429})  # unless a `Retry-After` header says when the request may succeed


class OpenAIErrorContent(BaseModel):
    model_config = ConfigDict(frozen=True)

    message: str
    type: str
    param: str | None
    code: str


class OpenAIErrorBody(BaseModel):
    """The body of every error under ``/openai/v1``."""

    model_config = ConfigDict(frozen=True)

    error: OpenAIErrorContent


OPENAI_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": OpenAIErrorBody, "description": "An error: message, type, parameter and code."}
}


class OpenAIRoute(APIRoute):
    """A route whose errors have OpenAI's format."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_errors(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return openai_error(parameter_error(request, error))
            except ZetaError as error:
                return openai_error(error)

        return handle_errors


def openai_error(error: ZetaError) -> JSONResponse:
    """The response to an error."""
    response = error_response(error)
    status = _status(response.status_code)
    headers = {
        name: value
        for name, value in response.headers.items()
        if name.lower() not in ("content-length", "content-type")
    }
    if "retry-after" in headers:
        headers["retry-after"] = str(min(int(headers["retry-after"]), MAX_RETRY_AFTER_SECONDS))
    elif status in _PERMANENT:
        headers["x-should-retry"] = "false"
    return JSONResponse(error_body(error), status, headers=headers)


def error_body(error: ZetaError) -> dict[str, Any]:
    """An error as JSON; the message contains the sentences of all its details."""
    content = error.body().error
    sentences = dict.fromkeys(detail.message for detail in content.details)
    message = "\n".join(sentences) if len(sentences) > 1 else content.message
    kind = _type(_status(STATUS_OF_TYPE.get(error.type, 500)))
    described = OpenAIErrorContent(message=message, type=kind, param=content.param, code=content.code)
    return OpenAIErrorBody(error=described).model_dump()


def _status(status: int) -> int:
    return 400 if status == 422 else status


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
