"""Events as a client parses them: typed fields, and tolerance for newer servers."""

from typing import Any

import pytest

from zeta_core.contract.job.events import (
    EVENT,
    CheckpointEvent,
    ErrorEvent,
    Event,
    LogEvent,
    ProgressEvent,
    SampleEvent,
    StatusEvent,
    UntypedEvent,
    WarningEvent,
    describe_perplexity,
)
from zeta_core.contract.job.status import JobStatus

CREATED_AT = "2026-03-01T12:00:00Z"
FIELDS: dict[type[Any], dict[str, Any]] = {
    StatusEvent: {"type": "status", "status": "succeeded", "result": {"train_loss": 1.5}},
    ProgressEvent: {"type": "progress", "phase": "training", "step": 3, "loss": 2.5, "steps": [{"step": 3}]},
    LogEvent: {"type": "log", "message": "Loading the model."},
    CheckpointEvent: {"type": "checkpoint", "name": "step-3", "step": 3, "bytes": 12},
    SampleEvent: {"type": "sample", "step": 3, "prompt": "a", "text": "b"},
    WarningEvent: {"type": "warning", "code": "diverging", "message": "The loss rises."},
    ErrorEvent: {"type": "error", "code": "out_of_memory", "message": "Memory ran out."},
}


def sent(**fields: Any) -> dict[str, Any]:
    return {"seq": 7, "attempt": 2, "created_at": CREATED_AT, **fields}


def parsed(**fields: Any) -> Event:
    return EVENT.validate_python(sent(**fields))


@pytest.mark.parametrize("model", FIELDS)
def test_an_event_is_parsed_to_the_class_of_its_type(model: type[Any]) -> None:
    event = parsed(**FIELDS[model])
    assert type(event) is model
    assert (event.seq, event.attempt, event.type) == (7, 2, FIELDS[model]["type"])
    assert event.model_dump(mode="json", exclude_unset=True) == sent(**FIELDS[model])


def test_typed_fields_have_the_types_of_the_contract() -> None:
    event = parsed(**FIELDS[StatusEvent])
    assert isinstance(event, StatusEvent)
    assert event.status is JobStatus.SUCCEEDED
    assert event.result is not None
    assert event.result.train_loss == 1.5
    assert event.reason is None


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "heartbeat", "message": "of a newer server"},
        {"type": "progress", "phase": "dreaming", "step": 3},
        {"type": "status", "status": "hibernating"},
        {"type": "checkpoint", "directory": "step-3"},
    ],
    ids=["type", "value", "state", "missing field"],
)
def test_an_event_of_a_newer_server_is_kept(fields: dict[str, Any]) -> None:
    event = parsed(**fields)
    assert isinstance(event, UntypedEvent)
    assert event.model_dump(mode="json") == sent(**fields)


def test_a_new_field_of_a_known_type_is_kept() -> None:
    event = parsed(**FIELDS[LogEvent], colour="green")
    assert isinstance(event, LogEvent)
    assert event.model_extra == {"colour": "green"}


def test_the_schema_selects_the_class_by_type() -> None:
    schema = EVENT.json_schema(mode="serialization")
    typed = schema["$defs"]["Event"]["anyOf"][0] if "Event" in schema["$defs"] else schema["anyOf"][0]
    assert typed["discriminator"]["propertyName"] == "type"
    assert set(typed["discriminator"]["mapping"]) == {fields["type"] for fields in FIELDS.values()}
    assert "created_at" in schema["$defs"]["ProgressEvent"]["required"]


def test_a_perplexity_of_hundreds_of_digits_is_not_shown_to_people() -> None:
    assert describe_perplexity(12.3456) == "12.35"
    assert describe_perplexity(1.014e304) == "over 1,000,000"
