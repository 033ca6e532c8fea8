"""The Typer application, and the options and arguments that several commands share.

The command modules import their dependencies inside the command functions, so `zeta --help` does not load an HTTP
client.
"""

from __future__ import annotations

from typing import Annotated

import typer

JOBS = "Jobs"
ARTIFACTS = "Checkpoints and files"
SERVICE = "The service"

app = typer.Typer(
    name="zeta",
    help="Train causal language models on your own machines: submit a job, follow it, download the checkpoint.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
JobId = Annotated[
    str, typer.Argument(metavar="ID", help="A job id, the beginning of one, or @last for the newest job.")
]


def print_version(wanted: bool) -> None:
    if wanted:
        from zeta_core.system.distribution import version

        typer.echo(f"zeta {version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Define the options that come before the command."""
