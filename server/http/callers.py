"""The dependency that every route but the open ones has: a request without a known key gets no further.

Nor does one with a query parameter where the route has none, or with one that is given twice and is not a list; a route
that has parameters refuses others by its own model. The open routes take any: a health check may add what it likes.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from server.auth import Caller, authenticate
from server.http.answers import known_parameters, list_parameters
from server.service import TheService
from zeta_core.contract.spec.validation import cut

_BEARER = HTTPBearer(auto_error=False, description="An API key.")


async def _caller(
    service: TheService,
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
) -> Caller:
    caller = await authenticate(service.database, credentials.credentials if credentials else None)
    if request.query_params:
        _check_names(request)
    return caller


def _check_names(request: Request) -> None:
    counts = Counter(name for name, _ in request.query_params.multi_items())
    if not known_parameters(request):
        raise RequestValidationError([{"type": "extra_forbidden", "loc": ("query", name)} for name in counts])
    repeated = [name for name in counts if counts[name] > 1 and name not in list_parameters(request)]
    if repeated:
        raise RequestValidationError([_given_twice(name, counts[name]) for name in repeated])


def _given_twice(name: str, count: int) -> dict[str, Any]:
    sentence = f"{cut(name)} is given {count} times; keep one of them."
    return {"type": "given_twice", "loc": ("query", name), "ctx": {"sentence": sentence}}


TheCaller = Annotated[Caller, Depends(_caller)]
