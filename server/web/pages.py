"""The frame of all pages: authentication, rendering, errors as pages, and security headers.

Guarantees: every page and error has a strict Content-Security-Policy, so no script or style runs that is not one of
our files, and nothing is fetched from another origin. A request that changes something needs the session's CSRF token.
Pages are never cached.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode, urlsplit

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from server.auth import Caller
from server.http.bodies import read_form
from server.http.error_responses import STATUS_OF_TYPE, error_headers
from server.http.proxies import public_path
from server.routes.routing import TheService
from server.sessions import CSRF_HEADER, BrowserSession
from server.web.assets import load_assets
from server.web.formatting import FILTERS
from zeta_core.contract.access import Scope
from zeta_core.contract.errors import AuthenticationFailed, InvalidRequest, PermissionDenied, ZetaError
from zeta_core.system.distribution import version

CSRF_FIELD = "csrf_token"
MAX_FORM_BYTES = 256 * 1024
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_TEMPLATES = Path(__file__).with_name("templates")


class PageRoute(APIRoute):
    """Answers errors with a page, and a missing session with a redirect to the login page."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                response = await handler(request)
            except AuthenticationFailed as error:
                response = _login_instead(request, error)
            except ZetaError as error:
                response = render_error(request, error)
            except RequestValidationError as error:
                fault = error.errors()[0]
                place = fault["loc"][-1] if fault["loc"] else "query"
                message = f"The parameter {str(place)!r} of this page is invalid: {fault['msg']}."
                response = render_error(request, InvalidRequest(message))
            response.headers.update(SECURITY_HEADERS)
            response.headers.setdefault("Cache-Control", "no-store")
            return response

        return handle


class PageRouter(APIRouter):
    """A router for pages, which the API's description doesn't contain. It answers HEAD like GET, without the body."""

    def __init__(self) -> None:
        super().__init__(include_in_schema=False, route_class=PageRoute)

    def add_api_route(  # pyright: ignore[reportIncompatibleMethodOverride] - FastAPI declares 25 options
        self, path: str, endpoint: Callable[..., Any], *, methods: Sequence[str] | None = None, **options: Any
    ) -> None:
        methods = list(methods or ("GET",))
        methods = [*methods, "HEAD"] if "GET" in methods else methods
        settings: dict[str, Any] = {**options, "response_model": None}
        super().add_api_route(path, endpoint, methods=methods, **settings)


@dataclass(frozen=True)
class PageRequest:
    """The request of a page, its session, and the form that it contains, if it is a POST."""

    request: Request
    session: BrowserSession
    form: Mapping[str, str]

    @property
    def caller(self) -> Caller:
        client = self.request.client
        return replace(self.session.caller, address=client.host if client else None)

    def render(self, template: str, /, status: int = 200, **values: Any) -> HTMLResponse:
        values = {**values, "caller": self.caller, "csrf_token": self.session.csrf_token}
        values |= {"is_admin": self.caller.is_admin, "can_submit": self.caller.allows(Scope.SUBMIT)}
        return _render(self.request, template, status, values)

    def redirect(self, path: str) -> Response:
        """Continue with another page; a request of htmx is answered with its own kind of redirect."""
        return redirect(self.request, path)


def _requires(scope: Scope) -> Callable[..., Coroutine[Any, Any, PageRequest]]:
    """A dependency: the page of a session whose key has this scope."""

    async def page(service: TheService, request: Request) -> PageRequest:
        token = request.cookies.get(service.sessions.cookie_name)
        if token is None:
            raise AuthenticationFailed("Log in first.", code="missing_session")
        session = await service.sessions.find(token)
        request.state.page = PageRequest(request, session, {})  # for the page of an error
        await service.count_request(session.caller)
        form: Mapping[str, str] = {}
        if request.method not in ("GET", "HEAD"):
            form = await read_form(request, MAX_FORM_BYTES)
            session.require_csrf(request.headers.get(CSRF_HEADER) or form.get(CSRF_FIELD))
        session.caller.require(scope, "This page" if request.method in ("GET", "HEAD") else "This command")
        return PageRequest(request, session, form)

    return page


ReadPage = Annotated[PageRequest, Depends(_requires(Scope.READ))]
SubmitPage = Annotated[PageRequest, Depends(_requires(Scope.SUBMIT))]
AdminPage = Annotated[PageRequest, Depends(_requires(Scope.ADMIN))]


def require_same_origin(request: Request) -> None:
    """Raise `PermissionDenied` for a form that another site sent, before there is a session with a CSRF token."""
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    is_foreign = site not in (None, "same-origin", "none") if site is not None else False
    if origin is not None and origin != "null":
        is_foreign = is_foreign or urlsplit(origin).netloc != request.headers.get("host")
    if is_foreign or origin == "null":
        raise PermissionDenied("Another site sent this login form; open the login page itself.", code="foreign_origin")


def redirect(request: Request, path: str) -> Response:
    target = public_path(request, path)
    if request.headers.get("hx-request") == "true":
        return Response(status_code=204, headers={"HX-Redirect": target})
    return RedirectResponse(target, status_code=303)


def render_plain(request: Request, template: str, /, status: int = 200, **values: Any) -> HTMLResponse:
    """Render a page for a reader who hasn't logged in."""
    nobody = {"caller": None, "csrf_token": None, "is_admin": False, "can_submit": False}
    return _render(request, template, status, {**values, **nobody})


def render_error(request: Request, error: ZetaError) -> HTMLResponse:
    """The page of an error, with the navigation if the reader has logged in."""
    status = STATUS_OF_TYPE.get(error.type, 500)
    template = "error_message.html" if request.headers.get("hx-request") == "true" else "error.html"
    page: PageRequest | None = getattr(request.state, "page", None)
    render = partial(render_plain, request) if page is None else page.render
    response = render(template, status, error=error, http_status=status)
    response.headers.update(error_headers(error))
    return response


def _login_instead(request: Request, error: AuthenticationFailed) -> Response:
    if error.code == "invalid_login_link":
        return render_plain(request, "login.html", 401, error=error.message, next="/")
    path = request.url.path.removeprefix(str(request.scope.get("root_path", "")))
    query = f"?{request.url.query}" if request.url.query else ""
    is_whole_page = request.method == "GET" and "hx-request" not in request.headers
    reason = {} if error.code == "missing_session" else {"ended": "true"}
    after = {"next": path + query} if is_whole_page and path != "/" else {}
    question = urlencode({**after, **reason}, quote_via=quote)
    return redirect(request, f"/login?{question}" if question else "/login")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    return environment


def _render(request: Request, template: str, status: int, values: Mapping[str, Any]) -> HTMLResponse:
    def url(path: str) -> str:
        return public_path(request, path)

    def asset(name: str) -> str:
        assert name in load_assets().files, name
        return public_path(request, f"/assets/{load_assets().digest}/{name}")

    values = {"request_id": secrets.token_hex(8), **values}  # recognizes a form that is sent twice
    text = (
        _environment()
        .get_template(template)
        .render(**values, url=url, asset=asset, path=request.url.path, version=version())
    )
    return HTMLResponse(text, status)
