"""docs/reference/events.md: the types of events and their fields, and the reasons of jobs that wait or have ended."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel

from tests.harness.reference_pages.markdown import cell, generated, table
from zeta_core.contract.job import events
from zeta_core.contract.job.status import REASON_SENTENCES, WAITING_SENTENCES

HEAD = """\
# Events, reasons and states

`GET /v1/jobs/{id}/events` returns the events of a job, as a list or as a stream of server-sent events, and `zeta
events` prints them. Each event has `seq` (from 1 within the job, without gaps), `attempt`, `created_at` and `type`.
Fields that are unknown to a client come from a newer server and can be ignored.
"""


def events_page() -> str:
    parts = [HEAD, generated("zeta_core/contract/job")]
    for line in events.LINE_MODELS:
        parts += [f"## `{line.model_fields['type'].default}`\n", f"{_prose(line)}\n", _fields(line)]
    parts += [_fields(events.StepFigures, "## `progress`: the entries of `steps`\n\n")]
    phases = ", ".join(f"`{phase}`" for phase in get_args(events.Phase))
    parts += [f"The phases of a run, in this order: {phases}.\n"]
    parts += [
        "## `status_reason`: why a job is in its state\n",
        table(("reason", "meaning and fix"), _sentences(REASON_SENTENCES)),
    ]
    parts += [
        "## `waiting_reason`: why a job waits\n",
        table(("reason", "meaning and fix"), _sentences(WAITING_SENTENCES)),
    ]
    return "\n".join(parts)


def _prose(model: type[BaseModel]) -> str:
    """The docstring of a model, with Markdown's code, and with the values of constants."""
    text = re.sub(r"`+([^`]+)`+", r"`\1`", " ".join((model.__doc__ or "").split()))
    return re.sub(r"`([A-Z_]{2,})`", lambda match: str(vars(events)[match[1]]), text)


def _fields(model: type[BaseModel], title: str = "") -> str:
    schema = model.model_json_schema(mode="serialization")
    fields = {name: field for name, field in schema["properties"].items() if name not in ("type", "created_at")}
    return title + table(
        ("field", "JSON type"), ((f"`{name}`", cell(json_type(field))) for name, field in fields.items())
    )


def _sentences(sentences: Mapping[Any, str]) -> list[tuple[str, str]]:
    return [(f"`{name}`", cell(sentence)) for name, sentence in sentences.items()]


def json_type(schema: dict[str, object]) -> str:
    """The type of a JSON schema in words, such as ``integer or null``."""
    alternatives = schema.get("anyOf", schema.get("oneOf"))
    if isinstance(alternatives, list):
        return " or ".join(dict.fromkeys(json_type(alternative) for alternative in alternatives))
    if isinstance(reference := schema.get("$ref"), str):
        return f"`{reference.rsplit('/', 1)[1]}`"
    if isinstance(values := schema.get("enum"), list):
        return ", ".join(f"`{value}`" for value in values)
    if schema.get("type") == "array" and isinstance(items := schema.get("items"), dict):
        return f"list ({json_type(items)})"
    return str(schema.get("type", "any JSON value"))
