"""Webhooks: the events that they receive, their targets, and the objects of ``/v1/webhooks``.

Deliveries follow the Standard Webhooks specification (https://www.standardwebhooks.com): the body is
``{"type", "timestamp", "data"}``, and a webhook's secret signs it.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from zeta_core.contract.identifiers import is_id
from zeta_core.contract.text import ShortLine

# The first three are the ends of a job.
JobEvent = Literal["job.succeeded", "job.failed", "job.cancelled", "job.waiting", "job.worker_lost"]
WebhookEvent = Literal[
    "job.succeeded", "job.failed", "job.cancelled", "job.waiting", "job.worker_lost", "webhook.disabled"
]
DEFAULT_EVENTS: tuple[JobEvent, ...] = ("job.succeeded", "job.failed", "job.cancelled")
JOB_EVENTS: tuple[JobEvent, ...] = get_args(JobEvent)
TEST_EVENT = "webhook.test"

MessageFormat = Literal["json", "slack"]
DeliveryStatus = Literal["pending", "delivered", "failed"]

MAX_URL_LENGTH = 2000
MAX_WEBHOOKS = 100  # of a project
MAX_NOTIFICATIONS = 10  # of a job
_URL_CHARACTERS = re.compile(r"[!-~]+")
_EMAIL = re.compile(r"[A-Za-z0-9.!#$&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,250}[A-Za-z0-9])")
_SLACK_HOST = "hooks.slack.com"


def email_of(url: str) -> str | None:
    """The address of a ``mailto:`` URL; ``None`` for other URLs."""
    scheme, _, address = url.partition(":")
    return address if scheme.lower() == "mailto" else None


def message_format(url: str, chosen: str | None) -> str:
    """The format of messages to this URL: email for an address, otherwise the chosen one or the default of its host."""
    if email_of(url) is not None:
        return "email"
    return chosen or ("slack" if urlsplit(url).hostname == _SLACK_HOST else "json")


def check_url(url: str) -> str:
    """``url`` if notifications can be sent to it. Raises `ValueError` with the reason."""
    if not _URL_CHARACTERS.fullmatch(url):
        raise ValueError("it must be printable ASCII without spaces; percent-encode other characters")
    address = email_of(url)
    if address is not None:
        if not _EMAIL.fullmatch(address):
            raise ValueError("it must name one address, such as mailto:team@example.org")
        return url
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError("it is not a valid URL") from error
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError("it must be a URL such as https://example.org/hook or mailto:team@example.org")
    if parts.username is not None or parts.password is not None:
        raise ValueError("it must not contain a user name or password")
    if parts.fragment or url.endswith("#"):
        raise ValueError("it must not contain a fragment (#...)")
    if port is not None and port not in (80, 443) and port < 1024:
        raise ValueError("its port must be 80, 443, or at least 1024")
    return url


def _check_target(value: str) -> str:
    return value if is_id(value, "webhook") else check_url(value)


WebhookUrl = Annotated[
    str,
    Field(min_length=1, max_length=MAX_URL_LENGTH, pattern=r"^(https?://|mailto:)"),
    AfterValidator(check_url),
]
NotifyTarget = Annotated[
    str,
    Field(min_length=1, max_length=MAX_URL_LENGTH, pattern=r"^(https?://|mailto:|webhook_)"),
    AfterValidator(_check_target),
]


class _RequestBody(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Response(BaseModel):
    """Frozen. A client keeps the fields of a newer server."""

    model_config = ConfigDict(frozen=True, extra="allow")


class NewWebhook(_RequestBody):
    """A request to create a webhook, which receives events of all jobs of the project."""

    url: WebhookUrl = Field(description="an https or http URL, or mailto: and an e-mail address")
    name: ShortLine | None = Field(default=None, description="what the webhook is for")
    events: list[WebhookEvent] = Field(
        default=list(DEFAULT_EVENTS),
        max_length=20,
        description="the events of all jobs that it receives; with none, it receives only those of jobs whose "
        "`notify` names it",
    )
    format: MessageFormat | None = Field(
        default=None, description="json, or slack for {'text': ...}; default: slack for hooks.slack.com, else json"
    )


class WebhookChange(_RequestBody):
    """A request to change a webhook; absent fields stay. ``enabled`` true enables one that was disabled."""

    url: WebhookUrl | None = Field(default=None, description="an https or http URL, or mailto: and an e-mail address")
    name: ShortLine | None = Field(default=None, description="what the webhook is for")
    events: list[WebhookEvent] | None = Field(default=None, max_length=20, description="the events that it receives")
    format: MessageFormat | None = Field(default=None, description="json, or slack for {'text': ...}")
    enabled: bool | None = Field(default=None, description="whether it receives events")


class Webhook(_Response):
    """A webhook without its secret, which is only shown when the webhook is created or its secret is rotated."""

    id: str
    object: Literal["webhook"] = "webhook"
    project: str
    name: str | None = None
    url: str
    events: list[str]
    format: str = Field(description="json, slack, email or openai")
    enabled: bool
    disabled_reason: str | None = Field(default=None, description="why the service disabled it")
    failing_since: datetime | None = Field(default=None, description="the first failure after the last success")
    created_by: str = Field(description="id of the key that created it")
    created_at: datetime


class CreatedWebhook(Webhook):
    """A new webhook, or one with a new secret."""

    secret: str = Field(description="the secret that signs the deliveries; it can't be shown again")


class Delivery(_Response):
    """One message to one receiver. ``id`` is the header ``webhook-id``, equal in every attempt."""

    id: str
    object: Literal["delivery"] = "delivery"
    webhook: str | None = Field(default=None, description="null for a URL in a job's `notify`")
    job: str | None = None
    event: str
    url: str
    status: DeliveryStatus
    attempts: int = Field(description="number of times that it was sent")
    status_code: int | None = Field(default=None, description="the HTTP status of the last response")
    error: str | None = Field(default=None, description="why the last attempt failed")
    created_at: datetime
    delivered_at: datetime | None = None
    next_attempt_at: datetime | None = Field(default=None, description="null if there is no further attempt")
    body: dict[str, JsonValue] = Field(description="the message: its type, its timestamp and its data")


def describe(event: str, data: dict[str, Any]) -> str:
    """An event as one sentence for people, as in a chat or the subject of an e-mail."""
    if event == TEST_EVENT:
        return "This is a test of the webhook."
    if event == "webhook.disabled":
        return f"Webhook {data['webhook']} was disabled: {data['reason']}"
    job = f"Job {data['name']} ({data['id']})" if data.get("name") else f"Job {data['id']}"
    message = f" {data['message']}" if data.get("message") else ""
    match event:
        case "job.waiting":
            return f"{job} has been waiting since {data['queued_at']}.{message}"
        case "job.worker_lost":
            return f"{job} lost its worker.{message}"
        case _:
            return f"{job} {'was cancelled' if data['status'] == 'cancelled' else data['status']}.{message}"
