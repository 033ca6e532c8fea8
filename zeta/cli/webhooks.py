"""`zeta webhooks`: who is notified about the jobs of a project."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from zeta.cli.app import SERVICE, AsJson, app, completing

if TYPE_CHECKING:
    from zeta.client import Client
    from zeta_core.contract.webhooks import CreatedWebhook, Delivery, MessageFormat, Webhook, WebhookEvent

webhooks_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(webhooks_app, name="webhooks", rich_help_panel=SERVICE)

TEST_SECONDS = 90.0

WebhookId = Annotated[
    str,
    typer.Argument(
        metavar="WEBHOOK",
        help="A webhook's id, the beginning of one, or its name.",
        autocompletion=completing("webhook"),
    ),
]
Url = Annotated[str, typer.Argument(metavar="URL", help="An https or http URL, or mailto: and an e-mail address.")]
Events = Annotated[
    list[str] | None,
    typer.Option(
        "--event",
        help="job.succeeded, job.failed, job.cancelled, job.waiting, job.worker_lost or webhook.disabled. Repeatable, "
        "or separated by commas; `none` for none. Default: the three ends of a job.",
    ),
]
Name = Annotated[str | None, typer.Option(help="What the webhook is for.")]
Format = Annotated[str | None, typer.Option(help="json, or slack for {'text': ...}.")]


@webhooks_app.callback()
def webhooks(context: typer.Context, as_json: AsJson = False) -> None:
    """List or manage the webhooks of the project."""
    if context.invoked_subcommand is None:
        list_webhooks(as_json)


@webhooks_app.command(name="create")
def create_webhook(
    url: Url, name: Name = None, event: Events = None, format: Format = None, as_json: AsJson = False
) -> None:
    """Create a webhook, and print the secret that signs its messages. The secret can't be shown again."""
    from zeta.client import Client

    with Client() as client:
        created = client.webhooks.create(
            url, name=name, events=_events(event), format=cast("MessageFormat | None", format)
        )
    _print_secret(created, f"Created {created.id} for {', '.join(created.events) or 'the jobs that name it'}", as_json)


@webhooks_app.command(name="list")
def list_webhooks(as_json: AsJson = False) -> None:
    """List webhooks, newest first."""
    from zeta.cli.output import print_list
    from zeta.cli.table import Column, print_table
    from zeta.client import Client

    with Client() as client:
        listed = client.webhooks.list()
    if as_json:
        print_list(listed)
        return
    columns = (
        Column("ID"),
        Column("NAME", min_width=8, drop_order=1),
        Column("URL", min_width=20, drop_order=3),
        Column("STATE", drop_order=2),
        Column("EVENTS", min_width=12, drop_order=4),
    )
    rows = [(hook.id, hook.name, hook.url, _state(hook), ",".join(hook.events) or None) for hook in listed]
    print_table(columns, rows, none="No webhooks; `zeta webhooks create URL` creates one.")


@webhooks_app.command(name="show")
def show_webhook(webhook: WebhookId, as_json: AsJson = False) -> None:
    """Show a webhook."""
    from zeta.client import Client

    with Client() as client:
        _print_webhook(_find(client, webhook), as_json)


@webhooks_app.command(name="set")
def change_webhook(
    webhook: WebhookId,
    url: Annotated[str | None, typer.Option(help="The new URL.")] = None,
    name: Name = None,
    event: Events = None,
    format: Format = None,
    enabled: Annotated[
        bool | None, typer.Option("--enable/--disable", help="Whether it receives events.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change a webhook. Without an option, its fields stay as they are."""
    from zeta.client import Client

    fields = {"url": url, "name": name, "events": _events(event), "format": format, "enabled": enabled}
    given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    with Client() as client:
        _print_webhook(client.webhooks.change(_find(client, webhook).id, **given), as_json)


@webhooks_app.command(name="rotate")
def rotate_secret(
    webhook: WebhookId,
    grace: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="How long the old secret signs, too: 1h, 7d. Default: not at all."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Give a webhook a new secret, and print it."""
    from zeta.cli.durations import seconds_of
    from zeta.client import Client

    grace_seconds = 0 if grace is None else seconds_of(grace, "--grace")
    with Client() as client:
        rotated = client.webhooks.rotate(_find(client, webhook).id, grace_seconds=grace_seconds)
    _print_secret(rotated, f"Rotated {rotated.id}", as_json)


@webhooks_app.command(name="test")
def send_test(webhook: WebhookId, as_json: AsJson = False) -> None:
    """Send a test message, and show whether it arrived. The exit status is 1 if it did not."""
    from zeta.cli.output import print_json, print_text
    from zeta.client import Client

    with Client() as client:
        found = _find(client, webhook)
        delivery = _wait(client, found.id, client.webhooks.test(found.id))
    if as_json:
        print_json(delivery)
    elif delivery.status == "delivered":
        status = f" (status {delivery.status_code})" if delivery.status_code is not None else ""
        print_text(f"The test message was delivered to {delivery.url}{status}.")
    else:
        print_text(f"The test message was not delivered to {delivery.url}: {delivery.error or 'it is still pending'}.")
    if delivery.status != "delivered":
        raise typer.Exit(1)


@webhooks_app.command(name="deliveries")
def list_deliveries(
    webhook: WebhookId,
    limit: Annotated[int, typer.Option(min=1, help="The maximum number of messages.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List the messages to a webhook, newest first."""
    from zeta.cli.output import print_list
    from zeta.cli.table import Column, print_table
    from zeta.client import Client

    with Client() as client:
        listed = client.webhooks.deliveries(_find(client, webhook).id, limit=limit)
    if as_json:
        print_list(listed)
        return
    columns = (
        Column("CREATED"),
        Column("EVENT"),
        Column("JOB", drop_order=2),
        Column("STATUS"),
        Column("ATTEMPTS", drop_order=4),
        Column("CODE", drop_order=3),
        Column("ERROR", min_width=20, drop_order=1),
    )
    rows = [
        (sent.created_at, sent.event, sent.job, sent.status, sent.attempts, sent.status_code, sent.error)
        for sent in listed
    ]
    print_table(columns, rows, none="No messages.")


@webhooks_app.command(name="delete")
def delete_webhook(webhook: WebhookId, as_json: AsJson = False) -> None:
    """Delete a webhook with the list of its messages."""
    from zeta.cli.output import print_json, print_text
    from zeta.client import Client

    with Client() as client:
        deleted = client.webhooks.delete(_find(client, webhook).id)
    if as_json:
        print_json(deleted)
    else:
        print_text(f"Deleted {deleted.id}.")


def _events(given: list[str] | None) -> list[WebhookEvent] | None:
    """The events of the options; the server checks their names."""
    if given is None:
        return None
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    return [] if names == ["none"] else cast("list[WebhookEvent]", names)


def _find(client: Client, text: str) -> Webhook:
    """The webhook with this id or name, or the only one whose id begins with the text."""
    from zeta_core.contract.errors import InvalidRequest, NotFound

    listed = client.webhooks.list()
    exact = [hook for hook in listed if hook.id == text]
    found = exact or [hook for hook in listed if hook.name == text or hook.id.startswith(text)]
    if not found:
        message = f"Webhook {text!r} not found; `zeta webhooks` lists the webhooks."
        raise NotFound(message, code="webhook_not_found", param="WEBHOOK")
    if len(found) > 1:
        ids = ", ".join(hook.id for hook in found)
        raise InvalidRequest(f"Several webhooks match {text!r}: {ids}; use one of these ids.", param="WEBHOOK")
    return found[0]


def _wait(client: Client, webhook_id: str, delivery: Delivery) -> Delivery:
    """The delivery when it has ended, or after `TEST_SECONDS`."""
    import time
    from threading import Event

    deadline, pause = time.monotonic() + TEST_SECONDS, Event()
    while delivery.status == "pending" and time.monotonic() < deadline:
        pause.wait(0.2)
        newest = client.webhooks.deliveries(webhook_id, limit=100)
        delivery = next((sent for sent in newest if sent.id == delivery.id), delivery)
    return delivery


def _state(hook: Webhook) -> str:
    if not hook.enabled:
        return "disabled"
    return "enabled" if hook.failing_since is None else "failing"


def _print_webhook(hook: Webhook, as_json: bool) -> None:
    from zeta.cli.output import print_fields, print_json

    if as_json:
        print_json(hook)
        return
    print_fields(
        [
            ("webhook", hook.id),
            ("name", hook.name),
            ("URL", hook.url),
            ("format", hook.format),
            ("events", ", ".join(hook.events) or "only those of jobs that name it"),
            ("state", _state(hook)),
            ("reason", hook.disabled_reason),
            ("failing since", hook.failing_since),
            ("created", hook.created_at),
        ]
    )


def _print_secret(created: CreatedWebhook, sentence: str, as_json: bool) -> None:
    from zeta.cli.output import notice, print_json

    if as_json:
        print_json(created)
        return
    print(created.secret, flush=True)
    notice(f"{sentence}. This is the secret that signs its messages; it can't be shown again.", as_json=as_json)
