"""`zeta backup` and `zeta restore`, on the server's machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zeta.cli.app import SERVICE, AsJson, app
from zeta.cli.service import Home, exec_module

Directory = Annotated[Path, typer.Argument(help="The folder of the backup.")]


@app.command(rich_help_panel=SERVICE)
def backup(directory: Directory, home: Home = None, as_json: AsJson = False) -> None:
    """Back up the database and all artifacts to a folder.

    The service may be running, and the backup is consistent. Another backup into the same folder replaces the earlier
    one and copies only new files. The data is that of ZETA_DATABASE_URL and ZETA_ARTIFACTS_URL, or of ZETA_HOME if
    these are unset. The exit status is 1 if files that the database names are missing or damaged.
    """
    _run("create", directory, home, as_json=as_json)


@app.command(rich_help_panel=SERVICE)
def restore(directory: Directory, home: Home = None, as_json: AsJson = False) -> None:
    """Restore a backup to an empty home, or to another empty database and artifact store.

    Nothing is overwritten, and the SHA-256 of every file is verified. The restored service can run beside the original.
    Repeat the command to continue an interrupted restore. The exit status is 1 if files are missing or damaged.
    """
    _run("restore", directory, home, as_json=as_json)


def _run(command: str, directory: Path, home: Path | None, *, as_json: bool) -> None:
    options = [command, str(directory), *(["--json"] if as_json else [])]
    exec_module("server.backup", "server", "sqlalchemy", options, home=home)
