"""`zeta audit`: who changed what."""

from __future__ import annotations

from typing import Annotated

import typer

from zeta.cli.access import OnlyProject
from zeta.cli.app import SERVICE, AsJson, app


@app.command(rich_help_panel=SERVICE)
def audit(
    project: OnlyProject = None,
    key: Annotated[str | None, typer.Option(metavar="ID", help="Only changes made with this key.")] = None,
    action: Annotated[str | None, typer.Option(help="Only this action, such as job.cancel.")] = None,
    object_id: Annotated[
        str | None, typer.Option("--object", metavar="ID", help="Only changes of this object, such as a job.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The maximum number of entries.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List changes and who made them, newest first. This needs a key with the scope `admin`."""
    from zeta.cli.output import print_list
    from zeta.cli.table import Column, print_table
    from zeta.client import Client

    with Client() as client:
        entries = client.admin.audit(project=project, key_id=key, action=action, object_id=object_id, limit=limit)
    if as_json:
        print_list(entries)
        return
    columns = (
        Column("TIME"),
        Column("PROJECT", drop_order=3),
        Column("KEY", min_width=8, drop_order=1),
        Column("ACTION"),
        Column("OBJECT", drop_order=2),
        Column("ADDRESS", drop_order=4),
    )
    rows = [
        (
            f"{entry.created_at:%Y-%m-%d %H:%M:%S}",
            entry.project,
            entry.key_name,
            entry.action,
            entry.object_id,
            entry.address,
        )
        for entry in entries
    ]
    print_table(columns, rows, none="No entries.")
