"""/healthz, /readyz and /metrics, for operators."""

from __future__ import annotations

import asyncio

from fastapi import Request, Response

from server import metrics, receipts
from server.artifacts import disk_state
from server.routes.routing import Router, TheCaller, TheService
from zeta_core.contract.job.responses import Health
from zeta_core.contract.receipt import ReceiptKey
from zeta_core.system.distribution import version

router = Router(tags=["operations"])


@router.get("/healthz", summary="Check Liveness")
async def is_live() -> Health:
    """Check whether this process responds, without checking its components."""
    return Health(status="ok", version=version())


@router.get("/readyz", summary="Check Readiness")
async def is_ready(service: TheService) -> Health:
    """Check whether jobs are accepted: 503 if the database isn't writable, `degraded` if anything else is failing."""
    await service.database.check_writable()
    redis = "ok" if service.engine.redis_ok else "unreachable; jobs are accepted and will wait"
    disk = await asyncio.to_thread(disk_state, service.settings)
    troubles = {f"loop {name}": str(trouble) for name, trouble in service.engine.loops.troubles().items()}
    failing = {
        f"worker {beat.worker}": "; ".join(f"{name}: {reason}" for name, reason in beat.failing.items())
        for beat in service.engine.workers()
        if beat.failing and service.engine.is_alive(beat.worker)
    }
    parts = {"database": "ok", "redis": redis, "disk": disk, **troubles, **failing}
    status = "ok" if set(parts.values()) == {"ok"} else "degraded"
    return Health(status=status, version=version(), parts=parts)


@router.get(
    "/metrics",
    summary="Read Service Metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}},
)
async def read_metrics(service: TheService, caller: TheCaller, request: Request) -> Response:
    """Return the service's metrics in Prometheus format."""
    job_metrics = request.app.state.job_metrics
    assert isinstance(job_metrics, metrics.JobMetrics)
    return Response(await job_metrics.text(service), media_type=metrics.CONTENT_TYPE)


@router.get("/v1/receipt-key")
async def get_receipt_key(service: TheService) -> ReceiptKey:
    """Return the public key that verifies the receipts of this installation."""
    return await receipts.get_receipt_key(service)
