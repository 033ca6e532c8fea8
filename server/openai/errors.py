"""Errors in OpenAI's format: ``{"error": {"message", "type", "param", "code"}}``, with the statuses that its API uses.

The status determines the client's exception class; ``x-should-retry`` and ``Retry-After`` determine whether it repeats
a request. Requests that would fail again are not repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from server.http.error_responses import STATUS_OF_TYPE, error_response, routing_error, routing_headers
from server.http.proxies import route_path
from server.http.query_parameters import parameter_error
from zeta_core.contract.errors import ZetaError

MAX_RETRY_AFTER_SECONDS = 120  # the client does not repeat a request that has to wait for longer
PREFIX = "/openai/v1"
_PERMANENT = frozenset({409, 429})  # unless a `Retry-After` header says when the request may succeed

ErrorResponse = Callable[[ZetaError, Mapping[str, str] | None], JSONResponse]


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


def register_routing_errors(app: FastAPI) -> None:
    """Report unknown routes and wrong methods under `PREFIX` in OpenAI's format, and others in the standard one."""
    app.add_exception_handler(HTTPException, _routing_error)


async def _routing_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    respond = error_response_of(route_path(request))
    return respond(routing_error(request, error), routing_headers(request, error))


def error_response_of(path: str) -> ErrorResponse:
    """The function that turns an error into the response of this path: in OpenAI's format, or in the standard one."""
    return openai_error if path == PREFIX or path.startswith(f"{PREFIX}/") else error_response


def openai_error(error: ZetaError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The response to an error."""
    response = error_response(error, headers)
    status = _status(response.status_code)
    kept = {
        name: value
        for name, value in response.headers.items()
        if name.lower() not in ("content-length", "content-type")
    }
    if "retry-after" in kept:
        kept["retry-after"] = str(min(int(kept["retry-after"]), MAX_RETRY_AFTER_SECONDS))
    elif status in _PERMANENT:
        kept["x-should-retry"] = "false"
    return JSONResponse(error_body(error), status, headers=kept)


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
