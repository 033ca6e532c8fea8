"""The command line's one app, and the options and arguments that its commands share.

The command modules import what they need inside their commands: `zeta --help` must not wait for an HTTP client.
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

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="A job's id, the beginning of one, or @last.")]


def print_version(wanted: bool) -> None:
    if wanted:
        from zeta_core.contract.distribution import version

        typer.echo(f"zeta {version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""
