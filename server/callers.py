"""The dependency that every route but the open ones has: a request without a known key gets no further.

Nor does one with a query parameter where the route has none; a route that has some refuses others by its own model. The
open routes take any: what looks whether a process lives may add what it likes.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from server.auth import Caller, authenticate
from server.http.answers import known_parameters
from server.service import TheService

_BEARER = HTTPBearer(auto_error=False, description="An API key.")


async def _caller(
    service: TheService,
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
) -> Caller:
    caller = await authenticate(service.database, credentials.credentials if credentials else None)
    if request.query_params and not known_parameters(request):
        names = dict.fromkeys(request.query_params)
        raise RequestValidationError([{"type": "extra_forbidden", "loc": ("query", name)} for name in names])
    return caller


TheCaller = Annotated[Caller, Depends(_caller)]
