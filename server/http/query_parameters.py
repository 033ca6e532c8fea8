"""Checks the query parameters of a request against those that its route declares.

FastAPI accepts query parameters that a route doesn't declare, and uses the last value of a repeated one. `check_query`
rejects both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError

from zeta_core.contract.errors import ErrorDetail, InvalidRequest, ZetaError
from zeta_core.contract.spec.validation import (
    MAX_DETAILS,
    MAX_SUGGESTIONS,
    closest,
    cut,
    error_from_details,
    value_detail,
)


def check_query(request: Request) -> None:
    """Reject query parameters on a route without any, and repeated ones that are not lists.

    A route with query parameters rejects unknown names by its own model. Raises `InvalidRequest`.
    """
    counts = Counter(name for name, _ in request.query_params.multi_items())
    if not _known_names(request):
        faults = [_unknown_parameter(name, (), search=False) for name in counts]
    else:
        lists = _list_names(request)
        faults = [_repeated_parameter(name, count) for name, count in counts.items() if count > 1 and name not in lists]
    if faults:
        raise error_from_details(faults, InvalidRequest)


def parameter_error(request: Request, error: RequestValidationError) -> ZetaError:
    """The error for invalid path, query and header parameters, as reported by FastAPI."""
    names = _known_names(request)
    details: dict[str, ErrorDetail] = {}
    faults = error.errors()
    for fault in faults[:MAX_DETAILS]:
        detail = _fault_detail(fault, names, search=len(details) < MAX_SUGGESTIONS)
        details.setdefault(detail.param or detail.message, detail)
    return error_from_details(list(details.values()), InvalidRequest, num_more=max(0, len(faults) - MAX_DETAILS))


def _fault_detail(fault: Mapping[str, Any], names: Sequence[str], *, search: bool) -> ErrorDetail:
    """``fault`` is an error of pydantic. Those that the query models raise themselves may contain a sentence."""
    context = fault.get("ctx", {})
    name = str(fault["loc"][1] if len(fault["loc"]) > 1 else context.get("name", "query"))
    if fault["type"] == "extra_forbidden":
        return _unknown_parameter(name, names, search=search)
    if "sentence" in context:
        return ErrorDetail(param=cut(name), message=context["sentence"], code="invalid_parameter")
    return value_detail(cut(name), fault).model_copy(update={"code": "invalid_parameter"})


def _unknown_parameter(name: str, names: Sequence[str], *, search: bool) -> ErrorDetail:
    param = cut(name)
    close = closest(param, names) if search else None
    fix = f"did you mean {close!r}?" if close else f"known parameters: {', '.join(names) or 'none'}."
    message = f"{param!r} is not a known parameter; {fix}"
    return ErrorDetail(param=param, message=message, code="unknown_parameter", suggestion=close)


def _repeated_parameter(name: str, count: int) -> ErrorDetail:
    message = f"{cut(name)} is given {count} times; remove all but one."
    return ErrorDetail(param=cut(name), message=message, code="invalid_parameter")


def _known_names(request: Request) -> list[str]:
    """The names of the query parameters of the request's route, from the OpenAPI description."""
    return [
        f"{parameter['name']}[k]" if parameter.get("style") == "deepObject" else parameter["name"]
        for parameter in _declared_parameters(request)
    ]


def _list_names(request: Request) -> set[str]:
    """The names of the query parameters that may be repeated."""
    return {
        parameter["name"] for parameter in _declared_parameters(request) if parameter["schema"].get("type") == "array"
    }


def _declared_parameters(request: Request) -> list[dict[str, Any]]:
    operations = request.app.openapi()["paths"].get(getattr(request.scope.get("route"), "path_format", ""), {})
    operation = operations.get("get" if request.method == "HEAD" else request.method.lower(), {})
    return [parameter for parameter in operation.get("parameters", []) if parameter["in"] == "query"]
