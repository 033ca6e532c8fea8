"""One message as it is sent: its bytes, its headers and its signature.

The signature is that of the Standard Webhooks specification, which libraries in many languages verify
(https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md).
"""

from __future__ import annotations

import base64
import hmac
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zeta_core.contract.webhooks import describe

SECRET_PREFIX = "whsec_"  # noqa: S105 - every secret begins with it
SECRET_BYTES = 32


@dataclass(frozen=True)
class Message:
    """A claimed delivery. ``attempt`` counts from 1; ``target`` is the webhook's id, or the URL."""

    id: str
    project: str
    event: str
    url: str
    format: str
    body: Mapping[str, Any]
    attempt: int
    target: str
    secrets: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The event as one sentence."""
        return describe(self.event, dict(self.body["data"]))


def new_secret() -> str:
    """A new signing secret."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def content(message: Message) -> bytes:
    """The bytes of the request body; each attempt sends the same ones."""
    body = {"text": _slack_text(message.text)} if message.format == "slack" else message.body
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def headers(message: Message, sent: bytes, timestamp: int) -> dict[str, str]:
    """The headers that identify and sign a request; ``timestamp`` is the Unix time of this attempt."""
    named = {"webhook-id": message.id, "webhook-timestamp": str(timestamp)}
    if message.secrets:
        named["webhook-signature"] = signature(message.secrets, message.id, timestamp, sent)
    return named


def signature(keys: Sequence[str], message_id: str, timestamp: int, sent: bytes) -> str:
    """One signature per secret, separated by spaces."""
    signed = f"{message_id}.{timestamp}.".encode() + sent
    digests = [hmac.digest(base64.b64decode(key.removeprefix(SECRET_PREFIX)), signed, "sha256") for key in keys]
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def _slack_text(text: str) -> str:
    """``text`` without mentions and links (https://docs.slack.dev/messaging/formatting-message-text)."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
