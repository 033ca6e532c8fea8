"""`zeta models`: name base models for the `openai` client."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from zeta.cli.app import ARTIFACTS, AsJson, app

models_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(models_app, name="models", rich_help_panel=ARTIFACTS)

ModelNameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="The name that the openai client uses, such as gpt-4o-mini-2024-07-18.")
]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A Hub id; a local folder, .tar, .gguf or config.json; file_...; job_...[/step-N].",
    ),
]
Defaults = Annotated[
    Path | None,
    typer.Option(metavar="SPEC.yaml", help="Fields of a job spec that every job of this name starts from."),
]


@models_app.callback()
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the named base models, or add and remove names."""
    if context.invoked_subcommand is None:
        list_models(as_json)


@models_app.command(name="add")
def add_model(name: ModelNameArgument, source: Source, defaults: Defaults = None, as_json: AsJson = False) -> None:
    """Name a base model. Requests of the openai client with this model then train it."""
    from zeta.cli.output import notice, print_json, print_text
    from zeta.client import Client
    from zeta.spec_file import read_spec

    fields: dict[str, Any] = {} if defaults is None else read_spec(defaults)
    with Client() as client:
        named = client.models.add(name, source, fields, on_upload=partial(notice, as_json=as_json))
        url = client.base_url
    if as_json:
        print_json(named)
    else:
        print_text(f"{named.name} is {_shown(named.model)}. Use it with OpenAI(base_url={f'{url}/openai/v1'!r}).")


@models_app.command(name="list")
def list_models(as_json: AsJson = False) -> None:
    """List the named base models of the project and of the server's settings."""
    from zeta.cli.output import print_list
    from zeta.cli.table import Column, print_table
    from zeta.client import Client

    with Client() as client:
        listed = client.models.list()
    if as_json:
        print_list(listed)
        return
    columns = (
        Column("NAME", min_width=8),
        Column("MODEL", min_width=8),
        Column("DEFAULTS", min_width=8, drop_order=2),
        Column("SET BY", drop_order=1),
    )
    rows = [
        (named.name, _shown(named.model), json.dumps(named.defaults) if named.defaults else "", named.origin)
        for named in listed
    ]
    print_table(columns, rows, none="No model has a name; add one with `zeta models add NAME SOURCE`.")


@models_app.command(name="remove")
def remove_model(name: ModelNameArgument, as_json: AsJson = False) -> None:
    """Remove a name. Jobs and models stay."""
    from zeta.cli.output import print_json
    from zeta.client import Client

    with Client() as client:
        removed = client.models.remove(name)
    if as_json:
        print_json(removed)
    else:
        print(f"Removed the name {removed.id}.")


def _shown(model: Any) -> str:
    return model if isinstance(model, str) else json.dumps(model)
