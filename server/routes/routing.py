"""Shared by all route modules: a router that checks API keys, the dependencies `TheService`, `TheSubmissions` and
`TheCaller`, and the description of JSON bodies.

Every route except the open ones rejects requests without a valid API key or its scope (`server.routes.scopes`), with
query parameters on a route that has none, or with a parameter that is repeated and not a list. A route that has query
parameters rejects unknown ones by its own model. The open routes ignore query parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from server.auth import Caller
from server.http.query_parameters import check_query
from server.routes.scopes import is_open, required_scope
from server.service import Service
from server.sessions import CSRF_HEADER
from server.submitting.submissions import Submissions
from zeta_core.contract.access import PROJECT_HEADER

MAX_SMALL_BODY_BYTES = 16 * 1024  # of a body that contains no spec, such as a new key
_BEARER = HTTPBearer(auto_error=False, description="An API key.")
_PROJECT = Header(
    alias=PROJECT_HEADER, description="the project in which an admin key acts; default: the project of the key"
)


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
    zeta_project: Annotated[str | None, _PROJECT] = None,
) -> Caller:
    token = request.cookies.get(service.sessions.cookie_name)
    if token is not None and "authorization" not in request.headers:
        caller = await _session_caller(service, request, token)
    else:
        caller = await service.keys.authenticate(credentials.credentials if credentials else None)
    path = str(getattr(request.scope.get("route"), "path_format", request.url.path))
    await service.count_request(caller)
    caller.require(required_scope(request.method, path), f"{request.method} {path}")
    if zeta_project is not None:
        caller = await service.keys.in_project(caller, zeta_project)
    if request.query_params:
        check_query(request)
    return replace(caller, address=request.client.host if request.client else None)


async def _session_caller(service: Service, request: Request, token: str) -> Caller:
    """The caller of a request with a session cookie; a request that isn't a read also needs the CSRF token."""
    session = await service.sessions.find(token)
    if request.method not in ("GET", "HEAD"):
        session.require_csrf(request.headers.get(CSRF_HEADER))
    return session.caller


TheCaller = Annotated[Caller, Depends(_caller)]


class Router(APIRouter):
    """Registers each GET route for HEAD, too (RFC 9110, section 9.1), and requires an API key, except on open routes.

    The server never sends the body of a response to HEAD. A handler checks the method only if creating the body is
    expensive.
    """

    def add_api_route(  # pyright: ignore[reportIncompatibleMethodOverride] - FastAPI declares 25 options
        self, path: str, endpoint: Callable[..., Any], *, methods: Sequence[str] | None = None, **options: Any
    ) -> None:
        methods = list(methods or ("GET",))
        if not all(is_open(method, self.prefix + path) for method in methods):
            options["dependencies"] = [Depends(_caller), *(options.get("dependencies") or ())]
        super().add_api_route(path, endpoint, methods=methods, **options)
        if "GET" in methods:
            hidden: dict[str, Any] = {**options, "include_in_schema": False}
            super().add_api_route(path, endpoint, methods=["HEAD"], **hidden)


def json_body(model: str, *, required: bool) -> dict[str, Any]:
    """The OpenAPI description of a body that the route parses itself."""
    schema = {"schema": {"$ref": f"#/components/schemas/{model}"}}
    return {"requestBody": {"required": required, "content": {"application/json": schema}}}
