"""The commands for choosing the server and its key, and for opening its dashboard: config, login, logout, dashboard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zeta.cli.app import SERVICE, AsJson, app

if TYPE_CHECKING:
    from zeta_core.system.sandbox import SandboxSupport


@app.command(rich_help_panel=SERVICE)
def config(as_json: AsJson = False) -> None:
    """Show the settings of this environment.

    These are the settings of the client and of `zeta up`, with secrets masked. All other ZETA_*
    variables that are set here are included, because `zeta up` passes them on.
    """
    import sys

    from zeta.cli.output import print_fields, print_json
    from zeta.server_lookup import ClientSettings, find_server
    from zeta.stored_login import login_file
    from zeta.up.settings import ShownSettings, child_settings
    from zeta_core.system.settings import process_environment

    variables = process_environment()
    target = find_server(variables)
    settings = ShownSettings.from_environment(variables).masked() | ClientSettings.from_environment(variables).masked()
    settings |= child_settings(variables)
    sandbox: SandboxSupport | None = None
    if sys.platform == "linux":
        from zeta_core.system.sandbox import probe

        sandbox = probe()
    server = None if target is None else target.url
    file = login_file(variables)
    connection = {
        "server": server,
        "server_from": None if target is None else target.source,
        "server_key": None if target is None or target.api_key is None else "***",
        "login_file": None if file is None else str(file),
        "sandbox_of_this_machine": str(sandbox or "none"),
    }
    if as_json:
        print_json({**connection, "settings": settings})
        return
    print_fields([(name.replace("_", " "), value) for name, value in connection.items()])
    print_fields([(name, value or "(unset)") for name, value in settings.items()])
    for gap in sandbox.gaps if sandbox else []:
        print(f"warning: {gap}", file=sys.stderr)


@app.command(rich_help_panel=SERVICE)
def login(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server's URL, such as http://gpu-box:8400.")],
    key_file: Annotated[
        Path | None,
        typer.Option(help="A file with the API key. Default: ZETA_API_KEY, a prompt, or one line of standard input."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Store a server's URL and API key for this user.

    They are stored only if a test request succeeds.
    """
    import sys

    from zeta.address import checked_url
    from zeta.cli.output import print_json, print_text
    from zeta.client import Client
    from zeta.server_lookup import ClientSettings
    from zeta.stored_login import Login, store_login
    from zeta_core.contract.errors import InvalidSettings
    from zeta_core.system.settings import process_environment

    address = checked_url(url, "URL")
    variables = process_environment()
    if key_file is not None:
        variables = {name: value for name, value in variables.items() if name != "ZETA_API_KEY"}
        variables["ZETA_API_KEY_FILE"] = str(key_file)
    key = ClientSettings.from_environment(variables).api_key
    if key is None:
        typed = typer.prompt("API key", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline()
        key = ClientSettings.from_environment({"ZETA_API_KEY": typed}).api_key
    if key is None:
        raise InvalidSettings("No API key was given; get one from the server's operator.")
    with Client(address, key) as client:
        client.jobs(limit=1)
    file = store_login(variables, Login(url=address, api_key=key))
    if as_json:
        print_json({"server": address, "login_file": str(file)})
    else:
        print_text(f"Logged in to {address}. The key is stored in {file}, which only you can read.")


@app.command(rich_help_panel=SERVICE)
def dashboard(as_json: AsJson = False) -> None:
    """Print a link that opens the dashboard in a browser.

    The link logs the browser in with your API key. It works once, within ten minutes.
    """
    from zeta.cli.output import print_json
    from zeta.client import Client

    with Client() as client:
        link = client.login_link()
    if as_json:
        print_json(link)
    else:
        print(link.url)


@app.command(rich_help_panel=SERVICE)
def logout(as_json: AsJson = False) -> None:
    """Remove the stored URL and API key."""
    from zeta.cli.output import print_json
    from zeta.stored_login import login_file, remove_login
    from zeta_core.system.settings import process_environment

    variables = process_environment()
    existed = remove_login(variables)
    if as_json:
        print_json({"logged_out": existed})
    else:
        print(f"Removed {login_file(variables)}." if existed else "No login was stored.")
