"""Logging in with an API key or a one-time link, and logging out."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

from fastapi import Query, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import BaseModel, ConfigDict

from server.http.bodies import read_form
from server.http.proxies import public_path
from server.routes.routing import TheService
from server.service import Service
from server.sessions import NewToken
from server.web.pages import MAX_FORM_BYTES, PageRouter, ReadPage, render_plain, require_same_origin
from zeta_core.contract.access import Scope
from zeta_core.contract.errors import AuthenticationFailed, PermissionDenied
from zeta_core.contract.job.events import utc_now

router = PageRouter()


class LoginQuery(BaseModel):
    """``link`` is the token of a one-time link, and ``next`` the page to continue with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    link: str | None = None
    next: str = "/"
    ended: bool = False


@router.get("/login")
async def show_login(service: TheService, request: Request, query: Annotated[LoginQuery, Query()]) -> Response:
    """The login page. A one-time link starts a session instead, but not for HEAD, with which programs preview links."""
    if query.link is not None and request.method == "GET":
        started = await service.sessions.use_link(query.link)
        # A page that continues by itself: after a redirect from another site, the browser would not send the cookie.
        page = render_plain(request, "logged_in.html")
        page.headers["Refresh"] = f"0; url={public_path(request, '/')}"
        _set_cookie(service, request, page, started)
        return page
    message = "Your session has ended. Log in again to continue." if query.ended else None
    return render_plain(request, "login.html", next=_inside(query.next), error=None, message=message)


@router.post("/login")
async def log_in(service: TheService, request: Request) -> Response:
    """Exchange the API key of the form for a session."""
    require_same_origin(request)
    form = await read_form(request, MAX_FORM_BYTES)
    after = _inside(form.get("next", "/"))
    try:
        key = form.get("key", "").strip()
        caller = await service.keys.authenticate(key)
        caller.require(Scope.READ, "The dashboard")
    except (AuthenticationFailed, PermissionDenied) as error:
        message = "Enter an API key." if error.code == "missing_api_key" else error.message
        return render_plain(request, "login.html", 401, next=after, error=message, message=None)
    response = RedirectResponse(public_path(request, after), status_code=303)
    _set_cookie(service, request, response, await service.sessions.start(key))
    return response


@router.post("/logout")
async def log_out(service: TheService, page: ReadPage) -> Response:
    """End the session."""
    await service.sessions.end(page.request.cookies[service.sessions.cookie_name])
    response = page.redirect("/login")
    response.delete_cookie(service.sessions.cookie_name, path=_cookie_path(page.request))
    response.headers["Clear-Site-Data"] = '"cache", "storage"'
    return response


def _set_cookie(service: Service, request: Request, response: Response, started: NewToken) -> None:
    response.set_cookie(
        service.sessions.cookie_name,
        started.token,
        max_age=int((started.expires_at - utc_now()).total_seconds()),
        path=_cookie_path(request),
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )


def _cookie_path(request: Request) -> str:
    return public_path(request, "") or "/"


def _inside(path: str) -> str:
    """The path, if it is one of this service; otherwise the first page. Browsers read ``//host`` as another site."""
    is_inside = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable()
    return quote(path, safe="/?&=%:,+~._-[]") if is_inside else "/"
