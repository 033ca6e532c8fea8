"""The dependency that every route but the open ones has: a request without a known key gets no further."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from server.auth import Caller, authenticate
from server.service import TheService

_BEARER = HTTPBearer(auto_error=False, description="An API key.")


async def _caller(
    service: TheService, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> Caller:
    return await authenticate(service.database, credentials.credentials if credentials else None)


TheCaller = Annotated[Caller, Depends(_caller)]
