"""Messages need a valid signature for their channel, and those of other versions are read."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from zeta_core.contract.wire.messages import (
    CONTRACT_VERSION,
    FROM_WORKER,
    BadSignature,
    Claim,
    ClaimAnswer,
    Dispatch,
    Heartbeat,
    JournalAck,
    JournalBatch,
    StopRequest,
    sign,
    verify,
)

CLAIM = Claim(job_id="job_1", attempt=1, worker="w", incarnation="i")


def test_a_signed_message_is_read_unchanged() -> None:
    fields = sign(CLAIM, "secret", channel="zeta:server")
    assert FROM_WORKER.validate_python(verify(fields, "secret", channel="zeta:server")) == CLAIM


@pytest.mark.parametrize(("secret", "channel"), [("other", "zeta:server"), ("secret", "zeta:worker:w")])
def test_another_secret_or_channel_is_rejected(secret: str, channel: str) -> None:
    with pytest.raises(BadSignature):
        verify(sign(CLAIM, "secret", channel="zeta:server"), secret, channel=channel)


def test_a_changed_body_is_rejected() -> None:
    fields = sign(CLAIM, "secret", channel="zeta:server")
    changed = {**fields, "body": fields["body"].replace("job_1", "job_2")}
    with pytest.raises(BadSignature):
        verify(changed, "secret", channel="zeta:server")


def test_a_message_without_a_signature_is_rejected() -> None:
    with pytest.raises(BadSignature):
        verify({"body": "{}"}, "secret", channel="zeta:server")


def test_fields_of_a_newer_version_are_kept() -> None:
    body = {**CLAIM.model_dump(), "contract_version": CONTRACT_VERSION + 1, "new_field": 7}
    read = FROM_WORKER.validate_python(body)
    assert read.model_dump()["new_field"] == 7


# Messages exactly as version 1 wrote them, by kind: workers are upgraded one by one while the others keep running.
OF_VERSION_1: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "hand_over": (
        Dispatch,
        {"job_id": "job_1", "attempt": 1, "worker": "w", "slots": [0], "spec": {}, "resolved_spec": {}, "processes": 1},
    ),
    "claim": (Claim, {"job_id": "job_1", "attempt": 1, "worker": "w", "incarnation": "i"}),
    "claim_answer": (ClaimAnswer, {"job_id": "job_1", "attempt": 1, "incarnation": "i", "granted": True}),
    "journal_batch": (
        JournalBatch,
        {"job_id": "job_1", "attempt": 1, "worker": "w", "first_line": 1, "lines": [{"type": "log", "message": "m"}]},
    ),
    "journal_ack": (JournalAck, {"job_id": "job_1", "attempt": 1, "stored_line": 1, "fenced": False}),
    "stop_order": (StopRequest, {"job_id": "job_1", "attempt": 1, "action": "hand_back"}),
    "heartbeat": (
        Heartbeat,
        {
            "worker": "w",
            "incarnation": "i",
            "beat": 1,
            "version": "0.1.0",
            "host": "h",
            "started_at": "2026-11-22T00:00:00Z",
            "cores": 2,
            "memory_bytes": 1,
            "labels": {},
            "stopping": False,
            "slots": [
                {"slot": 0, "kind": "cpu", "name": "2 cores", "memory_bytes": 1, "job_id": None, "attempt": None}
            ],
        },
    ),
}


@pytest.mark.parametrize("kind", OF_VERSION_1)
def test_messages_of_older_and_newer_versions_are_read(kind: str) -> None:
    model, body = OF_VERSION_1[kind]
    assert model.model_fields["kind"].default == kind if "kind" in model.model_fields else kind == "heartbeat"
    assert model.model_validate({"contract_version": 1, **body})
    newer = {**body, "contract_version": CONTRACT_VERSION + 1, "new_field": {"nested": [1]}}
    read = model.model_validate(newer).model_dump()
    assert (read["contract_version"], read["new_field"]) == (CONTRACT_VERSION + 1, {"nested": [1]})
    assert model.model_validate_json(model.model_validate(newer).model_dump_json()) == model.model_validate(newer)
