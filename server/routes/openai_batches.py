"""/openai/v1/batches: answer the requests of a file as a job."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query, Request

from server.openai import batches
from server.openai.batch_objects import Batch
from server.openai.bodies import read_fields
from server.openai.errors import OPENAI_ERRORS, OpenAIRoute
from server.openai.lists import NamedEndsList
from server.routes.jobs import IDEMPOTENCY_KEY
from server.routes.openai_files import RETRY_COUNT
from server.routes.routing import Router, TheCaller, TheService, json_body
from zeta_core.contract.errors import InvalidRequest

router = Router(prefix="/openai/v1/batches", tags=["openai"], route_class=OpenAIRoute, responses=OPENAI_ERRORS)


async def _batches(request: Request) -> batches.Batches:
    found = request.app.state.batches
    assert isinstance(found, batches.Batches)
    return found


@router.post("", openapi_extra=json_body("NewBatch", required=True))
async def create_openai_batch(
    service: TheService,
    creator: Annotated[batches.Batches, Depends(_batches)],
    caller: TheCaller,
    request: Request,
    retry_count: Annotated[int, RETRY_COUNT] = 0,
    idempotency_key: Annotated[str | None, IDEMPOTENCY_KEY] = None,
) -> Batch:
    """Check every request of the file, and create a batch. A retry returns the batch of the first attempt."""
    limit = service.settings.max_spec_bytes
    body = await read_fields(request, limit, batches.NewBatch, error_class=InvalidRequest)
    return await creator.create(caller, body, attempt=retry_count, idempotency_key=idempotency_key)


@router.get("")
async def list_openai_batches(
    service: TheService, caller: TheCaller, query: Annotated[batches.BatchListQuery, Query()]
) -> NamedEndsList[Batch]:
    """List the batches of the project, newest first."""
    return await batches.list_batches(service, caller, query)


@router.get("/{batch_id}")
async def get_openai_batch(service: TheService, caller: TheCaller, batch_id: str) -> Batch:
    """Return a batch with its current status."""
    return await batches.get_batch(service, caller, batch_id)


@router.post("/{batch_id}/cancel")
async def cancel_openai_batch(service: TheService, caller: TheCaller, batch_id: str) -> Batch:
    """Cancel an unfinished batch. A running one ends once its processes have exited."""
    return await batches.cancel_batch(service, caller, batch_id)
