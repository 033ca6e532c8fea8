"""/v1/workers: list, drain and undrain workers."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

from server import workers
from server.database.pagination import PageQuery
from server.routes.routing import Router, TheCaller, TheService
from zeta_core.contract.job.responses import Page, Worker

router = Router(prefix="/v1/workers", tags=["workers"])


@router.get("")
async def get_workers(service: TheService, caller: TheCaller, query: Annotated[PageQuery, Query()]) -> Page[Worker]:
    """List the workers that were seen within the last day, sorted by name."""
    return await workers.list_workers(service, caller, query)


@router.post("/{name}/drain")
async def drain_worker(service: TheService, caller: TheCaller, name: str) -> Worker:
    """Stop assigning jobs to the worker; its jobs save a checkpoint and move to other workers (scope `admin`)."""
    return await workers.set_draining(service, caller, name, True)


@router.post("/{name}/undrain")
async def undrain_worker(service: TheService, caller: TheCaller, name: str) -> Worker:
    """Assign jobs to a drained worker again (scope `admin`)."""
    return await workers.set_draining(service, caller, name, False)
