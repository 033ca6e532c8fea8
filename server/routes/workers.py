"""/v1/workers: list, drain and undrain workers, read the usage of their machines, and manage their secrets."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request
from pydantic import BaseModel, ConfigDict, Field

from server import worker_secrets, workers
from server.database.pagination import PageQuery
from server.http.bodies import read_body
from server.routes.routing import MAX_SMALL_BODY_BYTES, Router, TheCaller, TheService, json_body
from zeta_core.contract.access import CreatedWorkerSecret, NewWorkerSecret, WorkerSecret, WorkerSecretRotation
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.job.machine_usage import MAX_HOURS, WorkerUsage
from zeta_core.contract.job.responses import DeletedObject, Page, Worker
from zeta_core.contract.spec.validation import parse

router = Router(prefix="/v1/workers", tags=["workers"])


class UsageQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    hours: int = Field(default=1, ge=1, le=MAX_HOURS, description="how many hours to look back")


@router.get("")
async def get_workers(service: TheService, caller: TheCaller, query: Annotated[PageQuery, Query()]) -> Page[Worker]:
    """List the workers that were seen within the last day, sorted by name."""
    return await workers.list_workers(service, caller, query)


@router.post("", status_code=201, openapi_extra=json_body("NewWorkerSecret", required=True))
async def add_worker(service: TheService, caller: TheCaller, request: Request) -> CreatedWorkerSecret:
    """Let a worker join with a secret of its own. The response contains the secret, which can't be shown again."""
    data = await read_body(request, MAX_SMALL_BODY_BYTES)
    return await worker_secrets.add_worker(service, caller, parse(NewWorkerSecret, data, error_class=InvalidRequest))


@router.get("/secrets")
async def list_worker_secrets(service: TheService, query: Annotated[PageQuery, Query()]) -> Page[WorkerSecret]:
    """List the workers that have a secret of their own, sorted by name, without the secrets."""
    return await worker_secrets.list_worker_secrets(service, query)


@router.get("/{name}/usage")
async def get_usage(service: TheService, name: str, query: Annotated[UsageQuery, Query()]) -> WorkerUsage:
    """Read the usage of a worker's machine over time: cores, memory and GPUs.

    The last hour has a mean for every 15 seconds; a longer time has one for every five minutes.
    """
    return await workers.read_usage(service, name, query.hours)


@router.post("/{name}/rotate", openapi_extra=json_body("WorkerSecretRotation", required=False))
async def rotate_worker_secret(
    service: TheService, caller: TheCaller, request: Request, name: str
) -> CreatedWorkerSecret:
    """Replace the secret of a worker. With `grace_seconds`, the old one continues to work for that time."""
    data = await read_body(request, MAX_SMALL_BODY_BYTES, empty={})
    rotation = parse(WorkerSecretRotation, data, error_class=InvalidRequest)
    return await worker_secrets.rotate_worker_secret(service, caller, name, rotation)


@router.delete("/{name}")
async def revoke_worker(service: TheService, caller: TheCaller, name: str) -> DeletedObject:
    """Revoke the secret of a worker: its messages are rejected, and its jobs move to other workers."""
    return await worker_secrets.revoke_worker(service, caller, name)


@router.post("/{name}/drain")
async def drain_worker(service: TheService, caller: TheCaller, name: str) -> Worker:
    """Stop assigning jobs to the worker; its jobs save a checkpoint and move to other workers (scope `admin`)."""
    return await workers.set_draining(service, caller, name, True)


@router.post("/{name}/undrain")
async def undrain_worker(service: TheService, caller: TheCaller, name: str) -> Worker:
    """Assign jobs to a drained worker again (scope `admin`)."""
    return await workers.set_draining(service, caller, name, False)
