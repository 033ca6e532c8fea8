"""The client's own error classes, and the conversion of the server's errors to classes of the contract."""

from __future__ import annotations

from typing import TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from zeta_core.contract import errors
from zeta_core.contract.errors import ErrorContent, Unavailable, ZetaError

ResponseT = TypeVar("ResponseT")


class Unreachable(Unavailable):
    """Nothing responds at the URL, or a program other than this service does."""

    code = "unreachable"


class GatewayRefusal(ZetaError):
    """A gateway between this machine and the server rejected the request before it reached the server."""

    type = "gateway_error"
    code = "refused_by_gateway"


class InternalServerError(ZetaError):
    """An internal error of the server. Its log has the details under the request id."""

    type = "internal_error"
    code = "internal_error"


class InvalidResponse(InternalServerError):
    """The server's response does not follow the contract. Retrying would not help."""

    code = "bad_answer"


# Codes take precedence over types. The keys come from the contract's classes, so they cannot diverge from it.
_BY_CODE: dict[str, type[ZetaError]] = {errors.InvalidSpec.code: errors.InvalidSpec}
_BY_TYPE: dict[str, type[ZetaError]] = {
    error_class.type: error_class
    for error_class in (
        errors.InvalidRequest,
        errors.MalformedRequest,
        errors.AuthenticationFailed,
        errors.PermissionDenied,
        errors.NotFound,
        errors.Conflict,
        errors.TooLarge,
        errors.RequestTimeout,
        errors.QuotaExceeded,
        errors.Unavailable,
        errors.InvalidSettings,
        InternalServerError,
    )
}


def error_from(content: ErrorContent, request_id: str | None = None) -> ZetaError:
    """The error that the server raised, with its message, field and details."""
    error_class = _BY_CODE.get(content.code) or _BY_TYPE.get(content.type) or InternalServerError
    message = content.message
    if error_class is InternalServerError and request_id and request_id not in message:
        message = f"{message} (request {request_id})"
    return error_class(message, code=content.code, param=content.param, details=content.details)


def parse_response(model: type[ResponseT], response: httpx.Response) -> ResponseT:
    """Parse a response as a model of the contract. Raises `InvalidResponse` if it does not match."""
    try:
        return TypeAdapter(model).validate_json(response.content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"]) or "the response"
        raise InvalidResponse(
            f"{response.request.method} {response.request.url} returned a response that this client cannot parse "
            f"({where}: {fault['msg']}); check whether client and server have the same version."
        ) from error
