"""Shared by all route modules: a router that also answers HEAD, and the dependencies `TheService` and `TheCaller`.

Every route except the open ones (health checks) requires `TheCaller`: it rejects requests without a valid API key, with
query parameters on a route that has none, or with a parameter that is repeated and not a list. A route that has query
parameters rejects unknown ones by its own model. The open routes ignore query parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from server.auth import Caller
from server.http.error_responses import known_parameters, list_parameters
from server.service import Service
from server.submitting.submissions import Submissions
from zeta_core.contract.spec.validation import cut

_BEARER = HTTPBearer(auto_error=False, description="An API key.")


class Router(APIRouter):
    """Registers each GET route for HEAD, too (RFC 9110, section 9.1).

    The server never sends the body of a response to HEAD. A handler checks the method only if creating the body is
    expensive.
    """

    def add_api_route(  # pyright: ignore[reportIncompatibleMethodOverride] - FastAPI declares 25 options
        self, path: str, endpoint: Callable[..., Any], *, methods: Sequence[str] | None = None, **options: Any
    ) -> None:
        super().add_api_route(path, endpoint, methods=list(methods or ("GET",)), **options)
        if methods is None or "GET" in methods:
            hidden: dict[str, Any] = {**options, "include_in_schema": False}
            super().add_api_route(path, endpoint, methods=["HEAD"], **hidden)


async def _service(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


TheService = Annotated[Service, Depends(_service)]


async def _submissions(request: Request) -> Submissions:
    submissions = request.app.state.submissions
    assert isinstance(submissions, Submissions)
    return submissions


TheSubmissions = Annotated[Submissions, Depends(_submissions)]


async def _caller(
    service: TheService,
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
) -> Caller:
    caller = await service.keys.authenticate(credentials.credentials if credentials else None)
    if request.query_params:
        _check_parameters(request)
    return caller


def _check_parameters(request: Request) -> None:
    counts = Counter(name for name, _ in request.query_params.multi_items())
    if not known_parameters(request):
        raise RequestValidationError([{"type": "extra_forbidden", "loc": ("query", name)} for name in counts])
    repeated = [name for name in counts if counts[name] > 1 and name not in list_parameters(request)]
    if repeated:
        raise RequestValidationError([_repeated_parameter(name, counts[name]) for name in repeated])


def _repeated_parameter(name: str, count: int) -> dict[str, Any]:
    sentence = f"{cut(name)} is given {count} times; remove all but one."
    return {"type": "given_twice", "loc": ("query", name), "ctx": {"sentence": sentence}}


TheCaller = Annotated[Caller, Depends(_caller)]
