"""The official `openai` client, and the validation of responses against its types.

The client builds its models without validation, so a response with a wrong type would go unnoticed.
"""

from __future__ import annotations

from typing import TypeVar

from openai import OpenAI
from pydantic import BaseModel

ModelT = TypeVar("ModelT", bound=BaseModel)

PAUSED_STATUSES = ("paused", "pausing")  # documented by OpenAI, and missing in the client's types


def openai_client(server_url: str, api_key: str, *, max_retries: int = 0, timeout: float = 60) -> OpenAI:
    """A client of the server at ``server_url``, which repeats a failed request up to ``max_retries`` times."""
    return OpenAI(base_url=f"{server_url}/openai/v1", api_key=api_key, max_retries=max_retries, timeout=timeout)


def strictly(model: ModelT) -> ModelT:
    """``model`` if all its fields have exactly the types of the client's class. Raises `ValidationError`."""
    values = model.model_dump(mode="python", by_alias=True, warnings=False)
    if values.get("status") in PAUSED_STATUSES:
        values["status"] = "running"
    type(model).model_validate(values, strict=True)
    return model
