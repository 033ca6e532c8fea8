"""`zeta artifacts check`: compares the artifact store with the database, on the server's machine."""

from __future__ import annotations

from typing import Annotated

import typer

from zeta.cli.app import SERVICE, AsJson, app
from zeta.cli.service import Home, exec_module

artifacts = typer.Typer(help="Check the artifact store.", no_args_is_help=True)
app.add_typer(artifacts, name="artifacts", rich_help_panel=SERVICE)


@artifacts.command("check")
def check(
    verify_content: Annotated[
        bool, typer.Option("--hash", help="Also read every file, and compare its SHA-256.")
    ] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Compare the artifact store with the database.

    Lists files that are missing, extra, or of the wrong size, and changes nothing. The store is ZETA_ARTIFACTS_URL,
    and the database is ZETA_DATABASE_URL; by default, both are in ZETA_HOME. The exit status is 1 if they differ.
    """
    options = [*(["--hash"] if verify_content else []), *(["--json"] if as_json else [])]
    exec_module("server.store_check", "server", "sqlalchemy", options, home=home)
