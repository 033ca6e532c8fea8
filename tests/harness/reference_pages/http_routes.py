"""docs/reference/http.md: every route of the HTTP API, with its scope and parameters, from /openapi.json."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

from fastapi import FastAPI

from server.app import create_app
from server.routes.scopes import OPEN, SCOPES
from server.service import Service
from server.settings import ServerSettings
from tests.harness.reference_pages.events import json_type
from tests.harness.reference_pages.markdown import cell, generated, table

PROJECT_HEADER = "Zeta-Project"  # of almost every route, so the head of the page explains it
HEAD = """\
# The HTTP API

`GET /openapi.json` describes every route, parameter, body and response of a running server, in OpenAPI 3.1.
The API accepts and returns JSON. Send an API key with each request, as `Authorization: Bearer KEY`;
[security](../security.md) explains the scopes. An admin key acts in another project with the header `Zeta-Project:
NAME`. A failed request returns an [error object](errors.md).

Lists return `{"data": [...], "has_more": ...}`. To get the next page, pass the id of the last object as `after`.
"""


def description() -> dict[str, Any]:
    """The content of /openapi.json. It depends only on the settings, so no database is opened."""
    service = SimpleNamespace(settings=ServerSettings(worker_secret="unused"), database=None, tracing=None)
    app: FastAPI = create_app(cast(Service, service))
    return app.openapi()


def http_page() -> str:
    parts = [HEAD, generated("server/routes")]
    for title, routes in _groups().items():
        parts += [f"## {title}\n", *routes]
    return "\n".join(parts)


def _groups() -> dict[str, list[str]]:
    """The text of each route, grouped by the first part of its path."""
    groups: dict[str, list[str]] = {}
    for path, methods in sorted(description()["paths"].items()):
        words = [word for word in path.split("/") if word and not word.startswith("{")]
        start = 2 if words[:1] == ["openai"] else 1
        title = f"`/{'/'.join(words[: start + 1])}`" if words[start - 1 : start] == ["v1"] else "Operation"
        groups.setdefault(title, []).extend(_route(path, method, route) for method, route in methods.items())
    return groups


def _route(path: str, method: str, route: dict[str, Any]) -> str:
    name = f"{method.upper()} {path}"
    scope = (
        "No key is needed." if name in OPEN else f"Scope: `{SCOPES[name]}`." if name in SCOPES else "Scope: `admin`."
    )
    text = " ".join(str(route.get("description") or route.get("summary") or "").split()).replace("``", "`")
    rows = list(_parameters(route))
    parameters = "\n" + table(("parameter", "in", "type", "meaning"), rows) if rows else ""
    return f"### `{name}`\n\n{text} {scope}\n{_body(route)}{parameters}"


def _parameters(route: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for parameter in route.get("parameters", ()):
        if parameter["name"] == PROJECT_HEADER:
            continue
        kind = json_type(parameter.get("schema", {}))
        required = "" if parameter.get("required") else ", optional"
        yield f"`{parameter['name']}`", parameter["in"], cell(kind) + required, cell(parameter.get("description", ""))


def _body(route: dict[str, Any]) -> str:
    content: dict[str, Any] = route.get("requestBody", {}).get("content", {})
    kinds = [f"`{kind}`: {json_type(value.get('schema', {}))}" for kind, value in content.items()]
    return f"\nBody: {'; '.join(kinds)}.\n" if kinds else ""
