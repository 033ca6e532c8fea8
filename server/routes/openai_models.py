"""/openai/v1/models: list, read and delete models with the `openai` client."""

from __future__ import annotations

from server.openai import models
from server.openai.errors import OPENAI_ERRORS, OpenAIRoute
from server.routes.routing import Router, TheCaller, TheService

router = Router(prefix="/openai/v1/models", tags=["openai"], route_class=OpenAIRoute, responses=OPENAI_ERRORS)


@router.get("")
async def list_openai_models(service: TheService, caller: TheCaller) -> models.OpenAIModelList:
    """List the base models and the fine-tuned models of the project."""
    return await models.list_models(service, caller)


@router.get("/{model:path}")
async def get_openai_model(service: TheService, caller: TheCaller, model: str) -> models.OpenAIModel:
    """Return a base model, a fine-tuned model or a checkpoint."""
    return await models.get_model(service, caller, model)


@router.delete("/{model:path}")
async def delete_openai_model(service: TheService, caller: TheCaller, model: str) -> models.DeletedModel:
    """Delete a fine-tuned model, with its job and all of the job's artifacts."""
    return await models.delete_model(service, caller, model)
