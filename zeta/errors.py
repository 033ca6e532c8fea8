"""The client's own error classes, and the server's errors as classes of the contract."""

from __future__ import annotations

from typing import TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from zeta_core.contract import errors
from zeta_core.contract.errors import ErrorContent, Unavailable, ZetaError

AnswerT = TypeVar("AnswerT")


class Unreachable(Unavailable):
    """Nothing answers at the URL, or something other than this service does."""

    code = "unreachable"


class GatewayRefusal(ZetaError):
    """A gateway between this machine and the server refused this request; the server never saw it."""

    type = "gateway_error"
    code = "refused_by_gateway"


class ServerFault(ZetaError):
    """The server failed at something that the caller cannot fix; its log has the details, by request id."""

    type = "internal_error"
    code = "internal_error"


class BadAnswer(ServerFault):
    """The server's answer does not follow the contract; repeating the request would not help."""

    code = "bad_answer"


# A specific code first, then the family: the classes are the contract's, so the names cannot drift apart.
_BY_CODE: dict[str, type[ZetaError]] = {errors.InvalidSpec.code: errors.InvalidSpec}
_BY_TYPE: dict[str, type[ZetaError]] = {
    family.type: family
    for family in (
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
        ServerFault,
    )
}


def error_from(content: ErrorContent, request_id: str | None = None) -> ZetaError:
    """The error class that the server raised, with its sentence, field and details."""
    family = _BY_CODE.get(content.code) or _BY_TYPE.get(content.type) or ServerFault
    message = content.message
    if family is ServerFault and request_id and request_id not in message:
        message = f"{message} (request {request_id})"
    return family(message, code=content.code, param=content.param, details=content.details)


def read_answer(model: type[AnswerT], response: httpx.Response) -> AnswerT:
    """The answer as a model of the contract. Raises `BadAnswer` where it does not fit."""
    try:
        return TypeAdapter(model).validate_json(response.content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"]) or "the answer"
        raise BadAnswer(
            f"{response.request.method} {response.request.url} returned an answer that this client cannot read "
            f"({where}: {fault['msg']}); does the server have another version?"
        ) from error
