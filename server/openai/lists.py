"""Lists in OpenAI's shape, whose pages continue after the id of the last object."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

ItemT = TypeVar("ItemT")


class OpenAIList(BaseModel, Generic[ItemT]):
    model_config = ConfigDict(frozen=True)

    object: Literal["list"] = "list"
    data: list[ItemT]
    has_more: bool


class NamedEndsList(OpenAIList[ItemT], Generic[ItemT]):
    """Lists of files and of batches also name their ends."""

    first_id: str | None
    last_id: str | None
