"""One base class for everything that is the user's to mend, and the one JSON shape in which it is told."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from zeta_core.contract.printable import printable


class ErrorDetail(BaseModel):
    """One fault in what was sent: which field, what is wrong with its value, and the cure."""

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
    """The body of every HTTP answer that is not a success."""

    model_config = ConfigDict(frozen=True)

    error: ErrorContent


class ZetaError(Exception):
    """Something the user can mend: ``message`` names the value and the cure, ``code`` is stable.

    ``type`` is the family of the error (``invalid_request_error``, ``authentication_error``, ...): the server maps it
    to an HTTP status, so no error class knows HTTP.
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
        """This error in the one JSON shape; a single fault is also listed under ``details``.

        Control characters are escaped: a message may repeat a path or a name that somebody else chose.
        """
        details = list(self.details)
        if not details and self.param is not None:
            details = [ErrorDetail(param=self.param, message=self.message, code=self.code, suggestion=self.suggestion)]
        return ErrorBody(
            error=ErrorContent(
                message=printable(self.message),
                type=type(self).type,
                param=_printable(self.param),
                code=self.code,
                details=[_printable_detail(detail) for detail in details],
            )
        )


def _printable(text: str | None) -> str | None:
    return None if text is None else printable(text)


def _printable_detail(detail: ErrorDetail) -> ErrorDetail:
    return ErrorDetail(
        param=_printable(detail.param),
        message=printable(detail.message),
        code=detail.code,
        suggestion=_printable(detail.suggestion),
    )


class InvalidRequest(ZetaError):
    """What was sent is understood and wrong (HTTP 422), or is not understood at all (``malformed``, HTTP 400)."""


class MalformedRequest(ZetaError):
    """What was sent is not JSON, not multipart, or not readable for another reason."""

    type = "malformed_request_error"
    code = "malformed_request"


class InvalidSpec(InvalidRequest):
    """A job spec or a Trainer call with one or more bad fields; ``details`` names every one of them."""

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
    """The thing exists and its state does not allow this."""

    type = "conflict_error"
    code = "conflict"


class TooLarge(ZetaError):
    type = "too_large_error"
    code = "too_large"


class RequestTimeout(ZetaError):
    """The request's body did not arrive in time."""

    type = "timeout_error"
    code = "request_timeout"


class QuotaExceeded(ZetaError):
    type = "quota_error"
    code = "quota_exceeded"


class Unavailable(ZetaError):
    """A part of the service (database, artifact store, Redis) cannot be reached now; trying again later is the cure."""

    type = "unavailable_error"
    code = "unavailable"


class InvalidSettings(ZetaError):
    """A ``ZETA_*`` setting is missing or wrong."""

    type = "settings_error"
    code = "invalid_settings"
