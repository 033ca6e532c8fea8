"""/v1/workers: the machines that train, and what runs where."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

from server import workers
from server.database.pagination import PageQuery
from server.routes.routing import Router, TheCaller, TheService
from zeta_core.contract.job.answers import Page, Worker

router = Router(prefix="/v1/workers", tags=["workers"])


@router.get("")
async def get_workers(service: TheService, caller: TheCaller, asked: Annotated[PageQuery, Query()]) -> Page[Worker]:
    """Every worker that was heard of within a day, by name."""
    return await workers.list_workers(service, asked)


@router.post("/{name}/drain")
async def drain_worker(service: TheService, caller: TheCaller, name: str) -> Worker:
    """Give the worker no more jobs, and have its trainings save and hand theirs back (scope `admin`)."""
    return await workers.set_draining(service, caller, name, True)


@router.post("/{name}/undrain")
async def undrain_worker(service: TheService, caller: TheCaller, name: str) -> Worker:
    """Let a drained worker have jobs again (scope `admin`)."""
    return await workers.set_draining(service, caller, name, False)
