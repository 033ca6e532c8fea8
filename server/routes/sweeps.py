"""/v1/sweeps: create, list, read and cancel sweeps."""

from __future__ import annotations

from typing import Annotated

from fastapi import Header, Query, Request, Response

from server.database.pagination import PageQuery, cursor
from server.http.bodies import SPEC_SETTING, read_body
from server.http.proxies import public_path
from server.jobs import sweeps
from server.routes.routing import Router, TheCaller, TheService, json_body
from server.submitting.sweeps import create_sweep
from zeta_core.contract.identifiers import NEW_ID_PATTERN
from zeta_core.contract.job.responses import Page
from zeta_core.contract.job.sweep import Sweep, SweepResult

router = Router(prefix="/v1/sweeps", tags=["sweeps"])

# `create_sweep` checks it, with an error code of its own.
IDEMPOTENCY_KEY = Header(
    description="a unique key; repeating the request with it returns the same sweep",
    json_schema_extra={"pattern": "^[!-~]([ -~]{0,253}[!-~])?$"},
)


class SweepQuery(PageQuery):
    after: str | None = cursor(NEW_ID_PATTERN.format(prefix="sweep"))


@router.post("", status_code=201, openapi_extra=json_body("SweepRequest", required=True))
async def submit_sweep(
    service: TheService,
    caller: TheCaller,
    request: Request,
    response: Response,
    idempotency_key: Annotated[str | None, IDEMPOTENCY_KEY] = None,
) -> SweepResult:
    """Create jobs for all combinations of a grid, or for some chosen at random: all of them, or none."""
    body = await read_body(request, service.settings.max_spec_bytes, setting=SPEC_SETTING)
    sweep, is_replayed = await create_sweep(service, caller, body, idempotency_key)
    response.headers["Location"] = public_path(request, f"/v1/sweeps/{sweep.id}")
    if is_replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return sweep


@router.get("")
async def list_sweeps(service: TheService, caller: TheCaller, query: Annotated[SweepQuery, Query()]) -> Page[Sweep]:
    """List the sweeps of the project, newest first."""
    return await sweeps.list_sweeps(service, caller, query)


@router.get("/{sweep_id}")
async def get_sweep(service: TheService, caller: TheCaller, sweep_id: str) -> SweepResult:
    """Return a sweep with its jobs, their losses, and the best job."""
    return await sweeps.get_sweep(service, caller, sweep_id)


@router.post("/{sweep_id}/cancel", status_code=202)
async def cancel_sweep(service: TheService, caller: TheCaller, sweep_id: str) -> SweepResult:
    """Cancel all unfinished jobs of a sweep."""
    return await sweeps.cancel_sweep(service, caller, sweep_id)
