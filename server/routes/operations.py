"""/healthz, /readyz and /metrics: for whoever runs the service."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from sqlalchemy import select

from server import numbers
from server.artifacts import disk_state
from server.callers import TheCaller
from server.service import TheService
from zeta_core.contract.answers import Health
from zeta_core.contract.distribution import version

router = APIRouter(tags=["operations"])


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def is_live() -> Health:
    """Whether this process answers at all; asks nothing of its parts."""
    return Health(status="ok", version=version())


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def is_ready(service: TheService) -> Health:
    """Whether jobs can be taken: 503 without the database; `degraded` without Redis (jobs wait) or disk space."""
    async with service.database.read() as session:
        await session.execute(select(1))
    redis = "ok" if service.engine.redis_ok else "not reachable; jobs are taken and wait"
    disk = await asyncio.to_thread(disk_state, service.settings)
    parts = {"database": "ok", "redis": redis, "disk": disk}
    status = "ok" if set(parts.values()) == {"ok"} else "degraded"
    return Health(status=status, version=version(), parts=parts)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def read_metrics(service: TheService, caller: TheCaller, request: Request) -> Response:
    """The service's numbers for Prometheus."""
    job_numbers = request.app.state.job_numbers
    assert isinstance(job_numbers, numbers.JobNumbers)
    return Response(await job_numbers.text(service), media_type=numbers.CONTENT_TYPE)
