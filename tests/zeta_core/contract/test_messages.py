"""Messages need a valid signature for their channel, and those of other versions are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import BaseModel

from zeta_core.contract.wire.messages import (
    CONTRACT_VERSION,
    FROM_WORKER,
    Claim,
    ClaimAnswer,
    Dispatch,
    FromWorker,
    Heartbeat,
    JournalAck,
    JournalBatch,
    StopRequest,
)
from zeta_core.contract.wire.signatures import (
    MAX_BODY_BYTES,
    BadMessage,
    BadSignature,
    OldVersion,
    WorkerKey,
    derive_key,
    parse_individual_secret,
    read_envelope,
    read_heartbeat_envelope,
    sign,
)

CLAIM = Claim(job_id="job_1", attempt=1, worker="w", incarnation="i")


CHANNEL = "zeta:server"
KEY = derive_key("secret", "w")


def read(fields: Mapping[str, str], key: WorkerKey = KEY, channel: str = CHANNEL) -> FromWorker:
    return read_envelope(fields).open(FROM_WORKER, key, channel=channel)


def test_a_signed_message_is_read_unchanged() -> None:
    fields = sign(CLAIM, KEY, channel=CHANNEL, sent_at=1_700_000_000.5)
    assert read(fields) == CLAIM
    envelope = read_envelope({name.encode(): value.encode() for name, value in fields.items()})
    assert (envelope.worker, envelope.secret_id, envelope.sent_at) == ("w", "shared", 1_700_000_000.5)
    assert envelope.nonce != read_envelope(sign(CLAIM, KEY, channel=CHANNEL)).nonce


@pytest.mark.parametrize(
    ("key", "channel"),
    [
        (derive_key("other", "w"), CHANNEL),
        (derive_key("secret", "v"), CHANNEL),
        (derive_key("secret", "w", "another"), CHANNEL),
        (KEY, "zeta:worker:w"),
    ],
)
def test_another_secret_worker_or_channel_is_rejected(key: WorkerKey, channel: str) -> None:
    with pytest.raises(BadSignature):
        read(sign(CLAIM, KEY, channel=CHANNEL), key, channel)


@pytest.mark.parametrize("name", ["worker", "secret_id", "sent_at", "nonce", "body", "signature"])
def test_a_message_with_a_changed_field_is_rejected(name: str) -> None:
    fields = sign(CLAIM, KEY, channel=CHANNEL)
    changed = {"worker": "v", "secret_id": "s", "sent_at": "17", "nonce": "0" * 32, "body": "{}", "signature": "0" * 64}
    with pytest.raises(BadSignature):
        read({**fields, name: changed[name]})


@pytest.mark.parametrize(
    "changes",
    [
        {"worker": "w\nshared"},
        {"worker": "w" * 101},
        {"secret_id": "x:y"},
        {"sent_at": "1e9"},
        {"sent_at": "9" * 16},
        {"sent_at": "-1"},
        {"nonce": "0"},
        {"nonce": "\ud800" * 32},
        {"body": "x" * (MAX_BODY_BYTES + 1)},
    ],
)
def test_a_malformed_envelope_is_rejected(changes: dict[str, str]) -> None:
    with pytest.raises(BadMessage):
        read_envelope({**sign(CLAIM, KEY, channel=CHANNEL), **changes})


@pytest.mark.parametrize("entry", [b"\xff", b"5", b"[]", b'"text"', b"[" * 100_000, b"{", b"1" * 5000, b"null"])
def test_a_field_without_a_heartbeat_is_rejected(entry: bytes) -> None:
    with pytest.raises(BadMessage):
        read_heartbeat_envelope(entry)


def test_a_message_without_a_signature_is_rejected() -> None:
    with pytest.raises(BadSignature):
        read_envelope({"body": "{}"})


def test_a_message_of_an_earlier_version_names_the_cure() -> None:
    with pytest.raises(OldVersion, match="upgrade it"):
        read_envelope({"body": "{}", "signature": "0" * 64})


def test_an_individual_secret_contains_the_key_and_the_name_of_its_worker() -> None:
    key = derive_key("secret", "gpu-7.b", "0123456789abcdef")
    assert parse_individual_secret(key.text) == key
    assert parse_individual_secret("a shared secret") is None
    with pytest.raises(ValueError, match="copy the whole secret"):
        parse_individual_secret(key.text[:-1])


def test_fields_of_a_newer_version_are_kept() -> None:
    body = {**CLAIM.model_dump(), "contract_version": CONTRACT_VERSION + 1, "new_field": 7}
    assert FROM_WORKER.validate_python(body).model_dump()["new_field"] == 7


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
