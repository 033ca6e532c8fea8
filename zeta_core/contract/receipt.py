"""Receipts: signed statements about how a model was trained.

A receipt is a DSSE envelope (https://github.com/secure-systems-lab/dsse) whose payload is an in-toto statement
(https://github.com/in-toto/attestation/tree/main/spec/v1): its subjects are the files of the job's checkpoint, and its
predicate describes the training.
"""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from zeta_core.contract.job.job import Attempt

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://zeta-train.dev/receipt/v1"


class _Signed(BaseModel):
    """Frozen. Fields of a newer version are kept."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)


class Subject(_Signed):
    """A file that the statement is about. ``digest`` contains its ``sha256`` in hex."""

    name: str
    digest: dict[str, str]


class DataFile(_Signed):
    """An uploaded file that the training read."""

    id: str
    filename: str
    sha256: str | None = None
    purpose: str | None = None
    bytes: int | None = None


class Training(_Signed):
    """The predicate: the job, its spec, its inputs, the machines and the software.

    ``spec`` is the submitted one without ``notify``. ``data_fingerprint`` identifies the tokens that were trained on,
    and ``base_fingerprint`` the weights that an adapter was added to. ``versions`` are those of the last attempt.
    Values that an older worker did not report are null or empty.
    """

    job: str
    project: str
    name: str | None = None
    status: str
    created_at: datetime
    finished_at: datetime
    checkpoint: str
    manifest_sha256: str
    spec: dict[str, JsonValue]
    resolved_spec: dict[str, JsonValue]
    files: list[DataFile] = []
    base_checkpoint: str | None = Field(default=None, description="of another job, as job_.../final")
    base_manifest_sha256: str | None = None
    data_fingerprint: str | None = None
    base_fingerprint: str | None = None
    attempts: list[Attempt] = []
    versions: dict[str, str] = {}
    server_version: str


class Statement(_Signed):
    """An in-toto statement: its subjects, and the predicate about them."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(default=STATEMENT_TYPE, alias="_type")
    subject: list[Subject]
    predicate_type: str = Field(default=PREDICATE_TYPE, alias="predicateType")
    predicate: Training


class Signature(_Signed):
    """An Ed25519 signature in base 64, and the id of the key."""

    keyid: str
    sig: str


class Receipt(_Signed):
    """The envelope. ``payload`` is the statement as JSON, in base 64."""

    payload_type: str = Field(default=PAYLOAD_TYPE, alias="payloadType")
    payload: str
    signatures: list[Signature]


class ReceiptKey(_Signed):
    """The public key of the installation that signs receipts."""

    object: Literal["receipt_key"] = "receipt_key"
    keyid: str = Field(description="SHA-256 of the public key's 32 bytes, in hex")
    algorithm: Literal["ed25519"] = "ed25519"
    public_key: str = Field(description="the key in PEM format")


def signed_bytes(payload_type: str, payload: bytes) -> bytes:
    """The bytes that a DSSE signature signs: the type and the payload, each with its length."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def key_id(public_bytes: bytes) -> str:
    """The id of a key, from its 32 public bytes."""
    return hashlib.sha256(public_bytes).hexdigest()


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def statement_bytes(statement: Statement) -> bytes:
    """The statement as JSON."""
    return statement.model_dump_json(by_alias=True).encode()


def parse_payload(receipt: Receipt) -> tuple[bytes, Statement]:
    """The payload's bytes, and its statement. Raises `ValueError` if it is not a statement about a training."""
    if receipt.payload_type != PAYLOAD_TYPE:
        raise ValueError(f"its payload is of type {receipt.payload_type!r}")
    payload = base64.b64decode(receipt.payload, validate=True)
    statement = Statement.model_validate_json(payload)
    if statement.predicate_type != PREDICATE_TYPE:
        raise ValueError(f"it is a statement of type {statement.predicate_type!r}")
    return payload, statement
