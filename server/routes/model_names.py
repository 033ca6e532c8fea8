"""/v1/models: name base models for the `openai` client."""

from __future__ import annotations

from fastapi import Request, Response

from server.http.bodies import SPEC_SETTING, read_body
from server.http.proxies import public_path
from server.openai import named_models
from server.routes.routing import Router, TheCaller, TheService, json_body
from zeta_core.contract.job.responses import DeletedObject, Page
from zeta_core.contract.model_names import ModelName

router = Router(prefix="/v1/models", tags=["models"])


@router.post("", status_code=201, openapi_extra=json_body("NewModelName", required=True))
async def add_model_name(service: TheService, caller: TheCaller, request: Request, response: Response) -> ModelName:
    """Name a base model in the project, with defaults for its jobs."""
    body = await read_body(request, service.settings.max_spec_bytes, setting=SPEC_SETTING)
    named = await named_models.add(service, caller, body)
    response.headers["Location"] = public_path(request, "/v1/models")
    return named


@router.get("")
async def list_model_names(service: TheService, caller: TheCaller) -> Page[ModelName]:
    """List the named base models of the project and of the settings."""
    return await named_models.list_names(service, caller)


@router.delete("/{name:path}")
async def remove_model_name(service: TheService, caller: TheCaller, name: str) -> DeletedObject:
    """Remove a name. Jobs and models stay."""
    return await named_models.remove(service, caller, name)
