"""Error responses: their common JSON shape, and the mapping from error types to HTTP status codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from server.http.proxies import route_path
from server.http.query_parameters import parameter_error
from zeta_core.contract.errors import ErrorBody, MalformedRequest, QuotaExceeded, ZetaError
from zeta_core.contract.spec.validation import cut

STATUS_OF_TYPE: dict[str, int] = {
    "malformed_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "method_not_allowed_error": 405,
    "timeout_error": 408,
    "conflict_error": 409,
    "too_large_error": 413,
    "range_error": 416,
    "invalid_request_error": 422,
    "quota_error": 429,
    "head_too_large_error": 431,
    "internal_error": 500,
    "unavailable_error": 503,
}


class MethodNotAllowed(ZetaError):
    type = "method_not_allowed_error"
    code = "method_not_allowed"


class RouteNotFound(ZetaError):
    type = "not_found_error"
    code = "route_not_found"


class HeadTooLarge(ZetaError):
    type = "head_too_large_error"
    code = "head_too_large"


class RangeNotSatisfiable(ZetaError):
    """A Range header beyond the ``num_bytes`` of the content."""

    type = "range_error"
    code = "range_not_satisfiable"

    def __init__(self, message: str, num_bytes: int) -> None:
        super().__init__(message)
        self.num_bytes = num_bytes


class InternalError(ZetaError):
    """An internal error; the message reveals no implementation details."""

    type = "internal_error"
    code = "internal_error"


def error_response(error: ZetaError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    status = STATUS_OF_TYPE.get(error.type, 500)
    all_headers = {**(headers or {}), **error_headers(error)}
    return JSONResponse(error.body().model_dump(mode="json"), status, headers=all_headers)


def error_headers(error: ZetaError) -> dict[str, str]:
    """The headers of a response with this error."""
    status = STATUS_OF_TYPE.get(error.type, 500)
    extra: dict[str, str] = {}
    if status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    if status == 503:
        extra["Retry-After"] = "2"
    if isinstance(error, QuotaExceeded) and error.retry_after_seconds is not None:
        extra["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, RangeNotSatisfiable):
        extra["Content-Range"] = f"bytes */{error.num_bytes}"
    return extra


def register_error_handlers(app: FastAPI) -> None:
    """Register the error handlers; `RequestLogMiddleware` handles all other exceptions."""
    app.add_exception_handler(ZetaError, _zeta_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid_parameters)
    app.add_exception_handler(ClientDisconnect, _client_disconnected)


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "An error: message, type, code and all invalid fields."}
}


async def _zeta_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ZetaError)
    return error_response(error)


async def _client_disconnected(_request: Request, error: Exception) -> JSONResponse:
    """The client has disconnected, so this response only appears in the request log."""
    return error_response(MalformedRequest("The request body was truncated; send it again.", code="incomplete_body"))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return error_response(routing_error(request, error), routing_headers(request, error))


def routing_headers(request: Request, error: HTTPException) -> dict[str, str]:
    """The headers of the response to an error of the framework; a 405 lists the allowed methods."""
    return {"Allow": ", ".join(_allowed_methods(request))} if error.status_code == 405 else dict(error.headers or {})


def routing_error(request: Request, error: HTTPException) -> ZetaError:
    """An error of the framework as one of this service: an unknown route, a wrong method, or an unreadable request."""
    path = route_path(request)
    target = f"{cut(request.method)} {cut(path)}"
    if error.status_code == 404:
        return RouteNotFound(f"Not found: {target}. See /openapi.json for the available routes.")
    if error.status_code == 405:
        return MethodNotAllowed(f"Method not allowed: {target}. Allowed: {', '.join(_allowed_methods(request))}.")
    return MalformedRequest(f"{target} could not be read: {error.detail}.")


def _allowed_methods(request: Request) -> list[str]:
    """The allowed methods of the request's path; ``create_app`` stores the list of routes.

    A path without parameters has only the methods of its own routes: "validate" is not the id of a job.
    """
    routes: list[Route] = request.app.state.routes
    path = route_path(request)
    matching = [route for route in routes if route.path_regex.match(path)]
    matching = [route for route in matching if not route.param_convertors] or matching
    return sorted({method for route in matching for method in route.methods or ()})


async def _invalid_parameters(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return error_response(parameter_error(request, error))
