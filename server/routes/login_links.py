"""/v1/login-links: one-time links that open the dashboard with the key of the request."""

from __future__ import annotations

from fastapi import Request

from server.http.proxies import public_path
from server.routes.routing import Router, TheCaller, TheService
from zeta_core.contract.job.responses import LoginLink

router = Router(prefix="/v1/login-links", tags=["login links"])


@router.post("", status_code=201)
async def create_login_link(service: TheService, caller: TheCaller, request: Request) -> LoginLink:
    """Create a link that logs a browser in with this API key, once and within ten minutes."""
    new = await service.sessions.create_link(caller)
    origin = f"{request.url.scheme}://{request.url.netloc}"
    return LoginLink(url=f"{origin}{public_path(request, '/login')}?link={new.token}", expires_at=new.expires_at)
