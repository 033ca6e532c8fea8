"""Names of base models for the `openai` client, as the API receives and returns them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints

from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.spec.sources import ModelSource
from zeta_core.contract.spec.validation import ModelWithRules, StrictModel, invalid_value

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$"


class NewModelName(ModelWithRules, StrictModel):
    """A request to name a base model. ``defaults`` are fields of a spec that every job of this name starts from."""

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)] = Field(
        description="letters, digits, '.', '_', '-' and '/', at most 200 characters, such as gpt-4o-mini-2024-07-18"
    )
    model: ModelSource = Field(description="the base model, as in a job spec")
    defaults: dict[str, JsonValue] = Field(default={}, description="fields of a job spec, such as lora and seq_len")

    placeholders: ClassVar[dict[str, Any]] = {"name": "name", "model": "org/name"}

    def faults(self) -> list[ErrorDetail]:
        if not self.name.startswith("job_"):
            return []
        return [invalid_value("name", self.name, "names that begin with job_ are those of jobs; use another one")]


class ModelName(BaseModel):
    """A named base model. ``origin`` is ``settings`` for one in ``ZETA_OPENAI_MODELS``, which has no ``created_at``."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    object: Literal["model_name"] = "model_name"
    model: Any
    defaults: dict[str, JsonValue] = {}
    origin: Literal["project", "settings"]
    created_at: datetime | None = None
