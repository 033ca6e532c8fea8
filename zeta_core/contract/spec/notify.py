"""The field ``notify`` of a job spec: who is notified about the job."""

from __future__ import annotations

from pydantic import Field

from zeta_core.contract.spec.validation import StrictModel
from zeta_core.contract.webhooks import DEFAULT_EVENTS, JobEvent, MessageFormat, NotifyTarget


class Notify(StrictModel):
    to: NotifyTarget = Field(
        description="a webhook's id, an https or http URL, or mailto: and an e-mail address; only a webhook's id gets "
        "signed messages"
    )
    events: list[JobEvent] = Field(
        default=list(DEFAULT_EVENTS), min_length=1, max_length=10, description="the events of the job to send"
    )
    format: MessageFormat | None = Field(
        default=None,
        description="json, or slack for {'text': ...}; unset: the webhook's format, slack for hooks.slack.com, else "
        "json",
    )
