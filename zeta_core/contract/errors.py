"""The base class of all errors that a user or operator can fix, and the JSON format in which they are reported."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from zeta_core.contract.printable import printable
from zeta_core.contract.secret_texts import masked


class ErrorDetail(BaseModel):
    """One fault in a request: the field, what is wrong with its value, and how to fix it."""

    model_config = ConfigDict(frozen=True)

    param: str | None = None
    message: str
    code: str
    suggestion: str | None = None


class ErrorContent(BaseModel):
    model_config = ConfigDict(frozen=True)

    message: str
    type: str
    param: str | None = None
    code: str
    details: list[ErrorDetail] = []


class ErrorBody(BaseModel):
    """The body of every HTTP error response."""

    model_config = ConfigDict(frozen=True)

    error: ErrorContent


class ZetaError(Exception):
    """An error that the user can fix: ``message`` contains the value and the fix, and ``code`` is stable.

    ``type`` is the category of the error (``invalid_request_error``, ``authentication_error``, ...). The server maps it
    to an HTTP status, so the error classes are independent of HTTP.
    """

    type: str = "invalid_request_error"
    code: str = "invalid_request"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        suggestion: str | None = None,
        details: Sequence[ErrorDetail] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.suggestion = suggestion
        self.details = tuple(details)

    def body(self) -> ErrorBody:
        """This error as JSON; a single fault is also listed in ``details``.

        Control characters are escaped and secrets are masked, because a message may quote untrusted values.
        """
        details = list(self.details)
        if not details and self.param is not None:
            details = [ErrorDetail(param=self.param, message=self.message, code=self.code, suggestion=self.suggestion)]
        return ErrorBody(
            error=ErrorContent(
                message=_safe(self.message),
                type=type(self).type,
                param=None if self.param is None else _safe(self.param),
                code=self.code,
                details=[_safe_detail(detail) for detail in details],
            )
        )


def _safe(text: str) -> str:
    return masked(printable(text))


def _safe_detail(detail: ErrorDetail) -> ErrorDetail:
    return ErrorDetail(
        param=None if detail.param is None else _safe(detail.param),
        message=_safe(detail.message),
        code=detail.code,
        suggestion=None if detail.suggestion is None else _safe(detail.suggestion),
    )


class InvalidRequest(ZetaError):
    """The request can be parsed, but its content is invalid (HTTP 422)."""


class MalformedRequest(ZetaError):
    """The request cannot be parsed: it is not valid JSON or multipart data, or cannot be read for another reason."""

    type = "malformed_request_error"
    code = "malformed_request"


class InvalidSpec(InvalidRequest):
    """A job spec or a Trainer call with invalid fields, all of which are listed in ``details``."""

    code = "invalid_spec"


class AuthenticationFailed(ZetaError):
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDenied(ZetaError):
    type = "permission_error"
    code = "permission_denied"


class NotFound(ZetaError):
    type = "not_found_error"
    code = "not_found"


class Conflict(ZetaError):
    """The object exists, but its state does not allow the operation."""

    type = "conflict_error"
    code = "conflict"


class TooLarge(ZetaError):
    type = "too_large_error"
    code = "too_large"


class RequestTimeout(ZetaError):
    """The body of the request did not arrive in time."""

    type = "timeout_error"
    code = "request_timeout"


class QuotaExceeded(ZetaError):
    """A project has reached a limit; ``retry_after_seconds`` is known if it is a limit of requests."""

    type = "quota_error"
    code = "quota_exceeded"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        suggestion: str | None = None,
        details: Sequence[ErrorDetail] = (),
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(message, code=code, param=param, suggestion=suggestion, details=details)
        self.retry_after_seconds = retry_after_seconds


class Unavailable(ZetaError):
    """A component (database, artifact store, Redis) is temporarily unreachable; the client should retry later."""

    type = "unavailable_error"
    code = "unavailable"


class InvalidSettings(ZetaError):
    """A ``ZETA_*`` setting is missing or invalid."""

    type = "settings_error"
    code = "invalid_settings"
