"""Signatures of the messages between the server and its workers: who sent a message, when, and for which channel.

Every worker has its own `WorkerKey`, which signs the messages in both directions, so a worker can neither impersonate
another one nor accept its dispatches. All keys are derived from the server's ``ZETA_WORKER_SECRET``:

- A worker that has the *shared* secret, which is the server's, derives its key itself. It could derive the keys of all
  other workers, too, so this mode is for machines that trust each other, such as the one of `zeta up`.
- A worker that was added with ``zeta workers add`` has an *individual* secret, the text of its key. The server stores
  only the ``secret_id``, and derives the key when it needs it.

| field       | content                                                                |
|-------------|------------------------------------------------------------------------|
| `worker`    | the name of the worker that sends or receives the message              |
| `secret_id` | which secret of this worker signed it; `SHARED` for the shared one     |
| `sent_at`   | milliseconds since 1970, on the sender's clock                         |
| `nonce`     | a random number that identifies this message                           |
| `body`      | the message as JSON                                                    |
| `signature` | HMAC-SHA-256 of the channel and all other fields                       |

The channel is the name of the stream, queue or hash, so that a message can't be moved to another one. Receivers check
time and nonce with `zeta_core.system.replay_guard`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

CLOCK_WINDOW_SECONDS = 60.0  # the largest accepted difference between a message's time and the receiver's clock
MAX_BODY_BYTES = 32 * 2**20  # a batch of journal lines has at most 4.5 MiB, unless a single line is longer
MAX_HEARTBEAT_BYTES = 2**20
WORKER_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
SHARED = "shared"  # the id of the shared secret
INDIVIDUAL_PREFIX = "zeta-worker"  # of an individual secret, so that scanners for leaked secrets can recognize it

RejectionReason = Literal["malformed", "signature", "sender", "version", "clock", "replay"]

_FIELDS = ("worker", "secret_id", "sent_at", "nonce", "body", "signature")
_NAME = re.compile(WORKER_NAME_PATTERN.encode().removesuffix(b"$") + rb"\Z")
_SECRET_ID = re.compile(rb"[a-z0-9]{1,40}\Z")
_NONCE = re.compile(rb"[0-9a-f]{32}\Z")
_SENT_AT = re.compile(rb"[0-9]{1,15}\Z")
_INDIVIDUAL = re.compile(
    rf"{INDIVIDUAL_PREFIX}:([a-z0-9]{{1,40}}):([A-Za-z0-9][A-Za-z0-9._-]{{0,99}}):([0-9a-f]{{64}})\Z"
)

Message = TypeVar("Message")


class BadMessage(ValueError):
    """An entry in Redis that is not a valid message. Readers remove and count it."""

    reason: ClassVar[RejectionReason] = "malformed"


class BadSignature(BadMessage):
    """The message was not signed with this key for this channel."""

    reason = "signature"


class BadSender(BadMessage):
    """The sender has no valid secret, or it reports something that only another worker may report."""

    reason = "sender"


class OldVersion(BadMessage):
    """The message has no sender, time or nonce, like those of versions before 5."""

    reason = "version"


class BadTime(BadMessage):
    """The message is too old or from the future, by the receiver's clock."""

    reason = "clock"


class Replayed(BadMessage):
    """The message was received before."""

    reason = "replay"


# --- Keys -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkerKey:
    """The key that signs all messages from and to one worker."""

    worker: str
    secret_id: str
    key: bytes = field(repr=False)

    @property
    def text(self) -> str:
        """The individual secret of the worker, for its ``ZETA_WORKER_SECRET``."""
        return f"{INDIVIDUAL_PREFIX}:{self.secret_id}:{self.worker}:{self.key.hex()}"


def derive_key(server_secret: str, worker: str, secret_id: str = SHARED) -> WorkerKey:
    """The key of a worker. ``server_secret`` is the server's ``ZETA_WORKER_SECRET``."""
    derived = hmac.new(server_secret.encode(), f"zeta worker key\n{secret_id}\n{worker}".encode(), hashlib.sha256)
    return WorkerKey(worker, secret_id, derived.digest())


def parse_individual_secret(secret: str) -> WorkerKey | None:
    """The key in a worker's individual secret; ``None`` if it is a shared secret. Raises `ValueError` if malformed."""
    if not secret.startswith(f"{INDIVIDUAL_PREFIX}:"):
        return None
    if (match := _INDIVIDUAL.match(secret)) is None:
        raise ValueError("it is incomplete; copy the whole secret that `zeta workers add` printed")
    secret_id, worker, key = match.groups()
    return WorkerKey(worker, secret_id, bytes.fromhex(key))


# --- Signed messages --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Envelope:
    """A received message. Its fields have the expected form; nothing is verified before `open`."""

    worker: str
    secret_id: str
    sent_at: float  # seconds since 1970
    nonce: str
    body: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    signed: bytes = field(repr=False)  # the fields before the body, as they were signed

    def open(self, kind: TypeAdapter[Message], key: WorkerKey, *, channel: str) -> Message:
        """The message, after checking its signature. Raises only `BadMessage`, whatever it contains."""
        expected = _signature(key, channel, self.signed, self.body)
        if (self.worker, self.secret_id) != (key.worker, key.secret_id) or not hmac.compare_digest(
            self.signature, expected.encode()
        ):
            raise BadSignature("the signature is invalid; do server and worker have the same ZETA_WORKER_SECRET?")
        try:
            return kind.validate_python(parse_json(self.body))
        except (ValidationError, RecursionError) as error:
            raise BadMessage(str(error)) from error


def sign(message: BaseModel, key: WorkerKey, *, channel: str, sent_at: float | None = None) -> dict[str, str]:
    """The message as flat Redis fields. ``sent_at`` is in seconds since 1970; the default is now."""
    return sign_body(message.model_dump_json(), key, channel=channel, sent_at=sent_at)


def sign_body(body: str, key: WorkerKey, *, channel: str, sent_at: float | None = None) -> dict[str, str]:
    """A message whose JSON is ``body``, as flat Redis fields."""
    milliseconds = int((time.time() if sent_at is None else sent_at) * 1000)
    head = {
        "worker": key.worker,
        "secret_id": key.secret_id,
        "sent_at": str(milliseconds),
        "nonce": secrets.token_hex(16),
    }
    signature = _signature(key, channel, _joined([value.encode() for value in head.values()]), body.encode())
    return {**head, "body": body, "signature": signature}


def read_envelope(fields: object) -> Envelope:
    """The envelope in the fields of an entry. Raises only `BadMessage`, whatever ``fields`` contains.

    Keys and values may be bytes, as Redis stores them, or text.
    """
    named = _as_bytes(fields)
    values = [named.get(name.encode()) for name in _FIELDS]
    worker, secret_id, sent_at, nonce, body, signature = values
    if body is None or signature is None:
        raise BadSignature("the message has no body or no signature")
    if worker is None or secret_id is None or sent_at is None or nonce is None:
        raise OldVersion("its sender runs a version of Zeta that does not sign the time of its messages; upgrade it")
    if len(body) > MAX_BODY_BYTES:
        raise BadMessage(f"it has {len(body)} bytes, more than the limit of {MAX_BODY_BYTES}")
    head = (worker, secret_id, sent_at, nonce)
    if not all(form.match(value) for form, value in zip((_NAME, _SECRET_ID, _SENT_AT, _NONCE), head, strict=True)):
        raise BadMessage("its sender, time or nonce is malformed")
    return Envelope(
        worker.decode(), secret_id.decode(), int(sent_at) / 1000, nonce.decode(), body, signature, _joined(head)
    )


def sign_heartbeat(heartbeat: BaseModel, key: WorkerKey, *, channel: str, sent_at: float | None = None) -> str:
    """The value of the worker's field in the hash of heartbeats."""
    return json.dumps(sign(heartbeat, key, channel=channel, sent_at=sent_at))


def read_heartbeat_envelope(entry: bytes | str) -> Envelope:
    """The envelope in a field of the hash of heartbeats. Raises only `BadMessage`, whatever the field contains."""
    if len(entry) > MAX_HEARTBEAT_BYTES:
        raise BadMessage(f"it has {len(entry)} bytes, more than the limit of {MAX_HEARTBEAT_BYTES}")
    return read_envelope(parse_json(entry))


def parse_json(text: bytes | str) -> Any:
    """JSON data. Raises only `BadMessage`."""
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise BadMessage(f"it is not JSON: {error}") from error


def _as_bytes(fields: object) -> dict[bytes, bytes]:
    """The fields whose key and value are text or bytes, as bytes."""
    if not isinstance(fields, Mapping):
        return {}
    pairs: Mapping[object, object] = fields
    return {
        _encoded(key): _encoded(value)
        for key, value in pairs.items()
        if isinstance(key, str | bytes) and isinstance(value, str | bytes)
    }


def _encoded(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text


def _joined(head: list[bytes] | tuple[bytes, ...]) -> bytes:
    return b"\n".join(head)


def _signature(key: WorkerKey, channel: str, head: bytes, body: bytes) -> str:
    return hmac.new(key.key, channel.encode() + b"\n" + head + b"\n" + body, hashlib.sha256).hexdigest()
