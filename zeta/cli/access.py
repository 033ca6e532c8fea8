"""The commands for keys and projects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from zeta.cli.app import SERVICE, AsJson, app, completing

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from zeta.client import Client
    from zeta_core.contract.access import CreatedKey, Key, Project

keys_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
projects_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(keys_app, name="keys", rich_help_panel=SERVICE)
app.add_typer(projects_app, name="projects", rich_help_panel=SERVICE)

KeyName = Annotated[
    str,
    typer.Argument(
        metavar="KEY", help="A key's id, the beginning of one, or its name.", autocompletion=completing("key")
    ),
]
OnlyProject = Annotated[
    str | None, typer.Option("--project", metavar="NAME", help="Only this project. Default: all projects.")
]
ProjectArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="A project.", autocompletion=completing("project"))
]
_LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")
_BYTE_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


# --- Keys -------------------------------------------------------------------------------------------------------------


@keys_app.callback()
def keys(
    context: typer.Context,
    project: OnlyProject = None,
    revoked: Annotated[bool, typer.Option("--revoked", help="Also list revoked keys.")] = False,
    as_json: AsJson = False,
) -> None:
    """List API keys, or create, rotate and revoke them. This needs a key with the scope `admin`."""
    if context.invoked_subcommand is None:
        list_keys(project, revoked, as_json)


@keys_app.command(name="create")
def create_key(
    name: Annotated[str, typer.Option(help="Who or what uses the key.")],
    scopes: Annotated[
        list[str],
        typer.Option(help="read, submit, admin or metrics. Repeatable, or separated by commas."),
    ],
    project: Annotated[
        str, typer.Option(metavar="NAME", help="The key's project, which is created if it is new.")
    ] = "default",
    expires: Annotated[
        str | None,
        typer.Option(metavar="WHEN", help="When the key stops working: 12h, 90d, or a time. Default: never."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Create a key, and print the two lines that its user needs. The key can't be shown again."""
    from zeta.client import Client

    names = [scope.strip() for text in scopes for scope in text.split(",") if scope.strip()]
    expires_at = None if expires is None else _expiry(expires)
    with Client() as client:
        created = client.admin.create_key(name, scopes=names, project=project, expires_at=expires_at)
        new = "the new project" if created.is_new_project else "project"
        _print_created(client, created, f"Created {created.id} in {new} {created.project}", as_json)


@keys_app.command(name="list")
def list_keys(
    project: OnlyProject = None,
    revoked: Annotated[bool, typer.Option("--revoked", help="Also list revoked keys.")] = False,
    as_json: AsJson = False,
) -> None:
    """List keys, newest first."""
    from zeta.cli.output import print_list
    from zeta.cli.table import Column, print_table
    from zeta.client import Client

    with Client() as client:
        listed = client.admin.keys(project=project, include_revoked=revoked)
    if as_json:
        print_list(listed)
        return
    columns = (
        Column("ID"),
        Column("NAME", min_width=8),
        Column("PROJECT", drop_order=2),
        Column("SCOPES", drop_order=1),
        Column("CREATED", drop_order=5),
        Column("LAST USED", drop_order=4),
        Column("EXPIRES", drop_order=3),
    )
    rows = [
        (key.id, key.name, key.project, ",".join(key.scopes), key.created_at, key.last_used_at, _ending(key))
        for key in listed
    ]
    print_table(columns, rows, none="No keys.")


@keys_app.command(name="rotate")
def rotate_key(
    key: KeyName,
    grace: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="How long the old text continues to work: 1h, 7d. Default: it stops at once."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Give a key a new text. Its id, name, project and scopes stay the same."""
    from zeta.cli.durations import seconds_of
    from zeta.client import Client

    grace_seconds = 0 if grace is None else seconds_of(grace, "--grace")
    with Client() as client:
        rotated = client.admin.rotate_key(_find_key(client, key).id, grace_seconds=grace_seconds)
        _print_created(client, rotated, f"Rotated {rotated.id}", as_json)


@keys_app.command(name="revoke")
def revoke_key(key: KeyName, as_json: AsJson = False) -> None:
    """Revoke a key permanently."""
    from zeta.cli.output import print_json, print_text
    from zeta.client import Client

    with Client() as client:
        found = _find_key(client, key)
        revoked = client.admin.revoke_key(found.id)
    if as_json:
        print_json(revoked)
    else:
        print_text(f"Revoked {found.id} ({found.name}).")


def _print_created(client: Client, created: CreatedKey, sentence: str, as_json: bool) -> None:
    from urllib.parse import urlsplit

    from zeta.cli.output import notice, print_json

    if as_json:
        print_json(created)
        return
    print(f"export ZETA_URL={client.base_url}\nexport ZETA_API_KEY={created.key}", flush=True)
    notice(f"{sentence} (scopes: {', '.join(created.scopes)}). The key can't be shown again.", as_json=as_json)
    if urlsplit(client.base_url).hostname in _LOOPBACK_HOSTS:
        notice(
            "This URL works only on this machine; docs/operations/tls.md shows how to publish the service.",
            as_json=False,
        )


def _ending(key: Key) -> str | None:
    """When the key stops working, or that it was revoked."""
    if key.revoked_at is not None:
        return "revoked"
    return None if key.expires_at is None else f"{key.expires_at:%Y-%m-%d %H:%M}"


def _find_key(client: Client, text: str) -> Key:
    """The key with this id or name, or the only one whose id begins with the text."""
    from zeta_core.contract.errors import InvalidRequest, NotFound

    listed = client.admin.keys(include_revoked=True)
    exact = [key for key in listed if key.id == text]
    found = exact or [key for key in listed if key.revoked_at is None and (key.name == text or key.id.startswith(text))]
    if not found:
        raise NotFound(f"Key {text!r} not found; `zeta keys` lists the keys.", code="key_not_found", param="KEY")
    if len(found) > 1:
        ids = ", ".join(key.id for key in found)
        raise InvalidRequest(f"Several keys match {text!r}: {ids}; use one of these ids.", param="KEY")
    return found[0]


def _expiry(text: str) -> datetime:
    """A time in the future from ``90d`` or from an ISO 8601 time."""
    from datetime import UTC, datetime, timedelta

    from zeta.cli.durations import seconds_of
    from zeta_core.contract.errors import InvalidRequest

    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return datetime.now(UTC) + timedelta(seconds=seconds_of(text, "--expires"))
    if moment.tzinfo is None:
        raise InvalidRequest(f"--expires is {text!r}; add the offset, such as {text}Z.", param="--expires")
    return moment


# --- Projects ---------------------------------------------------------------------------------------------------------


@projects_app.callback()
def projects(context: typer.Context, as_json: AsJson = False) -> None:
    """List projects, or create and delete them. This needs a key with the scope `admin`."""
    if context.invoked_subcommand is None:
        list_projects(as_json)


@projects_app.command(name="list")
def list_projects(as_json: AsJson = False) -> None:
    """List projects by name."""
    from zeta.cli.output import print_list
    from zeta.cli.table import Column, print_table
    from zeta.client import Client

    with Client() as client:
        listed = client.admin.projects()
    if as_json:
        print_list(listed)
    else:
        columns = (
            Column("NAME", min_width=8),
            Column("QUEUED"),
            Column("RUNNING"),
            Column("GPUS", drop_order=2),
            Column("STORED", drop_order=1),
            Column("CREATED", drop_order=3),
        )
        print_table(columns, [_usage_row(project) for project in listed], none="No projects.")


@projects_app.command(name="create")
def create_project(name: ProjectArgument, as_json: AsJson = False) -> None:
    """Create a project."""
    from zeta.cli.output import print_json, print_text
    from zeta.client import Client

    with Client() as client:
        created = client.admin.create_project(name)
    if as_json:
        print_json(created)
    else:
        print_text(f"Created project {created.name}. `zeta keys create --project {created.name}` gives access to it.")


@projects_app.command(name="show")
def show_project(name: ProjectArgument, as_json: AsJson = False) -> None:
    """Show what a project uses, and its limits."""
    from zeta.client import Client

    with Client() as client:
        _print_project(client.admin.project(name), as_json)


@projects_app.command(name="set")
def set_limits(
    name: ProjectArgument,
    limits: Annotated[
        list[str],
        typer.Argument(
            metavar="LIMIT=VALUE...",
            help="max_queued_jobs, max_running_jobs, max_gpus, max_stored_bytes, max_upload_bytes, "
            "max_requests_per_minute, max_priority, max_streams or hub (off, public, operator-token). Sizes may have a "
            "unit (50GiB); `default` restores the default.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Set limits of a project."""
    from zeta.client import Client

    values = dict(_limit(text) for text in limits)
    with Client() as client:
        _print_project(client.admin.set_limits(name, values), as_json)


@projects_app.command(name="delete")
def delete_project(name: ProjectArgument, as_json: AsJson = False) -> None:
    """Delete a project without jobs, files and keys, and its model names."""
    from zeta.cli.output import print_json
    from zeta.client import Client

    with Client() as client:
        deleted = client.admin.delete_project(name)
    if as_json:
        print_json(deleted)
    else:
        print(f"Deleted project {name}.")


def _usage_row(project: Project) -> tuple[object, ...]:
    """What a project uses, each with its limit if there is one."""
    from zeta.cli.output import size

    limits, used = project.effective_limits, project.usage

    def of(value: int, limit: str, show: Callable[[int], str] = str) -> str:
        most = limits.get(limit)
        return f"{show(value)} of {show(most)}" if isinstance(most, int) else show(value)

    return (
        project.name,
        of(used.queued_jobs, "max_queued_jobs"),
        of(used.running_jobs, "max_running_jobs"),
        of(used.gpus, "max_gpus"),
        of(used.stored_bytes, "max_stored_bytes", size),
        project.created_at,
    )


def _print_project(project: Project, as_json: bool) -> None:
    from zeta.cli.output import print_fields, print_json

    if as_json:
        print_json(project)
        return
    _, queued, running, gpus, stored, created_at = _usage_row(project)
    usage = [("queued jobs", queued), ("running jobs", running), ("GPUs", gpus), ("stored", stored)]
    limits = [
        (name, f"{_limit_text(name, value)}{'' if project.limits.get(name) is not None else ' (default)'}")
        for name, value in project.effective_limits.items()
    ]
    print_fields([("project", project.name), ("created", created_at), *usage, *limits])


def _limit_text(name: str, value: int | str | None) -> str:
    from zeta.cli.output import size

    if value is None:
        return "no limit"
    return size(value) if isinstance(value, int) and name.endswith("_bytes") else str(value)


def _limit(text: str) -> tuple[str, int | str | None]:
    """A limit and its value, from ``max_stored_bytes=50GiB``; the server checks the name."""
    from zeta_core.contract.errors import InvalidRequest

    name, _, value = text.partition("=")
    if value == "default":
        return name, None
    if name == "hub":
        return name, value
    number = value.rstrip("KMGTiB")
    unit = value[len(number) :]
    is_number = number.isascii() and number.removeprefix("-").isdigit() and len(number) <= 18
    if not is_number or unit not in _BYTE_UNITS or (unit and not name.endswith("_bytes")):
        raise InvalidRequest(
            f"{text!r} is not a valid limit; use LIMIT=NUMBER, LIMIT=default, or for bytes a size such as 50GiB.",
            param="LIMIT=VALUE",
        )
    return name, int(number) * _BYTE_UNITS[unit]
