"""/openai/v1/webhook_endpoints: who is notified about the ends of fine-tuning jobs and batches."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request

from server.http.bodies import read_body
from server.openai import webhook_endpoints as endpoints
from server.openai.errors import OPENAI_ERRORS, OpenAIRoute
from server.openai.lists import NamedEndsList
from server.routes.routing import MAX_SMALL_BODY_BYTES, Router, TheCaller, TheService, json_body
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.spec.validation import parse

router = Router(
    prefix="/openai/v1/webhook_endpoints", tags=["openai"], route_class=OpenAIRoute, responses=OPENAI_ERRORS
)


@router.post("", openapi_extra=json_body("NewEndpoint", required=True))
async def create_openai_webhook_endpoint(
    service: TheService, caller: TheCaller, request: Request
) -> endpoints.WebhookEndpointWithSecret:
    """Create a webhook endpoint. The response contains the secret that signs its messages."""
    body = await read_body(request, MAX_SMALL_BODY_BYTES)
    return await endpoints.create_endpoint(
        service, caller, parse(endpoints.NewEndpoint, body, error_class=InvalidRequest)
    )


@router.get("")
async def list_openai_webhook_endpoints(
    service: TheService, caller: TheCaller, query: Annotated[endpoints.EndpointListQuery, Query()]
) -> NamedEndsList[endpoints.WebhookEndpoint]:
    """List the webhook endpoints of the project, newest first."""
    return await endpoints.list_endpoints(service, caller, query)


@router.get("/{webhook_endpoint_id}")
async def get_openai_webhook_endpoint(
    service: TheService, caller: TheCaller, webhook_endpoint_id: str
) -> endpoints.WebhookEndpoint:
    """Return a webhook endpoint without its secret."""
    return await endpoints.get_endpoint(service, caller, webhook_endpoint_id)


@router.post("/{webhook_endpoint_id}", openapi_extra=json_body("EndpointChange", required=True))
async def change_openai_webhook_endpoint(
    service: TheService, caller: TheCaller, webhook_endpoint_id: str, request: Request
) -> endpoints.WebhookEndpoint:
    """Change a webhook endpoint; absent fields stay."""
    body = await read_body(request, MAX_SMALL_BODY_BYTES)
    change = parse(endpoints.EndpointChange, body, error_class=InvalidRequest)
    return await endpoints.change_endpoint(service, caller, webhook_endpoint_id, change)


@router.delete("/{webhook_endpoint_id}")
async def delete_openai_webhook_endpoint(
    service: TheService, caller: TheCaller, webhook_endpoint_id: str
) -> endpoints.DeletedWebhookEndpoint:
    """Delete a webhook endpoint with its deliveries."""
    return await endpoints.delete_endpoint(service, caller, webhook_endpoint_id)


@router.post("/{webhook_endpoint_id}/rotate_secret", openapi_extra=json_body("SecretRotation", required=False))
async def rotate_openai_webhook_secret(
    service: TheService, caller: TheCaller, webhook_endpoint_id: str, request: Request
) -> endpoints.WebhookEndpointWithSecret:
    """Give a webhook endpoint a new secret; the old one may sign, too, for 24 hours."""
    body = await read_body(request, MAX_SMALL_BODY_BYTES, empty={})
    rotation = parse(endpoints.SecretRotation, body, error_class=InvalidRequest)
    return await endpoints.rotate_secret(service, caller, webhook_endpoint_id, rotation)


@router.post("/{webhook_endpoint_id}/test", openapi_extra=json_body("EndpointTest", required=True))
async def test_openai_webhook_endpoint(
    service: TheService, caller: TheCaller, webhook_endpoint_id: str, request: Request
) -> endpoints.WebhookEndpointTestResult:
    """Send a sample event to a webhook endpoint, and return the status code of its response."""
    body = await read_body(request, MAX_SMALL_BODY_BYTES)
    test = parse(endpoints.EndpointTest, body, error_class=InvalidRequest)
    return await endpoints.test_endpoint(service, caller, webhook_endpoint_id, test)
