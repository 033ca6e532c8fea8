"""Naming base models for the `openai` client: `Client.models`.

with Client() as client:
    client.models.add("gpt-4o-mini-2024-07-18", "HuggingFaceTB/SmolLM2-135M-Instruct", {"lora": {"r": 16}})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from zeta.errors import parse_response
from zeta.request_parts import json_body
from zeta.transport import HttpTransport
from zeta_core.contract.job.responses import DeletedObject, Page
from zeta_core.contract.model_names import ModelName

ReadSpec = Callable[[Mapping[str, Any], Callable[[str], None]], dict[str, Any]]


class NamedModels:
    """Each method calls one route of the API."""

    def __init__(self, transport: HttpTransport, read_spec: ReadSpec) -> None:
        """``read_spec`` uploads the local files that a spec names and returns the spec to send."""
        self._transport = transport
        self._read_spec = read_spec

    def add(
        self,
        name: str,
        model: Any,
        defaults: Mapping[str, Any] | None = None,
        *,
        on_upload: Callable[[str], None] = lambda _: None,
    ) -> ModelName:
        """Name a base model; ``model`` is as in a spec, and may be a local folder.

        ``defaults`` are fields of a spec. Raises `InvalidRequest` naming every invalid field.
        """
        spec = self._read_spec({**(defaults or {}), "model": model}, on_upload)
        body = {"name": name, "model": spec.pop("model"), "defaults": spec}
        headers = {"Content-Type": "application/json"}
        return parse_response(
            ModelName, self._transport.request("POST", "/v1/models", content=json_body(body), headers=headers)
        )

    def list(self) -> list[ModelName]:
        """The named base models of the project and of the server's settings."""
        return parse_response(Page[ModelName], self._transport.request("GET", "/v1/models")).data

    def remove(self, name: str) -> DeletedObject:
        """Remove a name; jobs and models stay."""
        return parse_response(DeletedObject, self._transport.request("DELETE", f"/v1/models/{quote(name, safe='/')}"))
