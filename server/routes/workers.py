"""/v1/workers: the machines that train, and what runs where."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from server.callers import TheCaller
from server.fleet_objects import list_workers
from server.pages import PageQuery
from server.service import TheService
from zeta_core.contract.answers import Page, Worker

router = APIRouter(prefix="/v1/workers", tags=["workers"])


@router.get("")
async def get_workers(service: TheService, caller: TheCaller, asked: Annotated[PageQuery, Query()]) -> Page[Worker]:
    """Every worker that was heard of within a day, by name."""
    return list_workers(service.engine, asked)
