"""The commands that run the service: up, down and status, and its processes individually (server, migrate)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zeta.cli.app import SERVICE, AsJson, app

if TYPE_CHECKING:
    from zeta.up.home import UpState
    from zeta.up.settings import UpSettings

Home = Annotated[Path | None, typer.Option(help="Data directory (ZETA_HOME). Default: ~/.zeta.")]
Host = Annotated[str | None, typer.Option(help="Address to listen on (ZETA_HOST). Default: 127.0.0.1.")]
Port = Annotated[
    int | None,
    typer.Option(min=0, max=65535, help="Port to listen on (ZETA_PORT); 0 picks a free one. Default: 8400."),
]


@app.command(rich_help_panel=SERVICE)
def up(
    host: Host = None,
    port: Port = None,
    home: Home = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Run in the background.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole service on this machine.

    A Valkey server, the API server and one worker are started. Ctrl-C stops them; running jobs save a checkpoint and
    are queued again.
    """
    from zeta.up.control import detach as start_detached
    from zeta.up.service import LocalService
    from zeta.up.settings import UpSettings
    from zeta_core.system.settings import process_environment

    variables = process_environment()
    settings = UpSettings.from_environment(variables, host=host, port=port, home=home)

    def ready(state: UpState) -> None:
        _print_ready(state, settings, detached=detach, as_json=as_json)

    if detach:
        ready(start_detached(settings, variables))
    else:
        LocalService(settings, variables, _print_progress).run(ready)


@app.command(rich_help_panel=SERVICE)
def down(home: Home = None, as_json: AsJson = False) -> None:
    """Stop the service that `zeta up` started.

    Running jobs save a checkpoint and are queued again.
    """
    from zeta.cli.output import print_json
    from zeta.up.control import down as stop
    from zeta.up.settings import UpSettings
    from zeta_core.system.settings import process_environment

    settings = UpSettings.from_environment(process_environment(), home=home)
    state = stop(settings)
    if as_json:
        print_json({"stopped": state is not None, "home": str(settings.home)})
    else:
        print(f"Stopped {state.url}." if state is not None else f"No service is running in {settings.home}.")


@app.command(rich_help_panel=SERVICE)
def status(home: Home = None, as_json: AsJson = False) -> None:
    """Show whether the service is running, and its URL.

    The exit status is 4 if the service cannot be reached.
    """
    from zeta.cli.exit_status import ExitStatus
    from zeta.cli.output import print_fields, print_json
    from zeta.client import Client
    from zeta.errors import Unreachable
    from zeta.server_lookup import find_server
    from zeta.up.home import Home as HomeFolder
    from zeta.up.settings import UpSettings
    from zeta_core.system.settings import process_environment

    variables = process_environment()
    settings = UpSettings.from_environment(variables, home=home)
    here = HomeFolder(settings.home).running()
    target = find_server(variables, home=home)
    if target is None:
        raise Unreachable(
            f"No service is running in {settings.home}, and no other server is configured; start one with `zeta up`."
        )
    use_proxy = not target.is_local
    with Client(target.url, target.api_key, use_proxy=use_proxy, certificate=target.certificate) as client:
        is_ready = client.is_ready()
        workers = [] if not is_ready else client.workers()
        running = [] if not is_ready else client.jobs(status="running", limit=1000)
        queued = [] if not is_ready else client.jobs(status="queued", limit=1000)
    is_here = here is not None and here.url == target.url
    facts: list[tuple[str, object]] = [
        ("url", target.url),
        ("ready", "yes" if is_ready else "no"),
        ("state", here.state if here is not None and is_here else None),
        ("pid", here.pid if here is not None and is_here else None),
        ("processes", _processes(here) if here is not None and is_here else None),
        ("home", str(settings.home) if is_here else None),
        ("url from", target.source),
        ("workers", len([worker for worker in workers if worker.status == "ready"]) if is_ready else None),
        ("jobs running", len(running) if is_ready else None),
        ("jobs queued", len(queued) if is_ready else None),
    ]
    if as_json:
        facts_by_name = {"known_from" if name == "url from" else name.replace(" ", "_"): value for name, value in facts}
        children = dict(here.children) if here is not None and is_here else {}
        print_json(facts_by_name | {"ready": is_ready, "processes": children})
    else:
        print_fields(facts)
    if not is_ready:
        raise typer.Exit(ExitStatus.UNREACHABLE)


@app.command(rich_help_panel=SERVICE)
def server(host: Host = None, port: Port = None, home: Home = None) -> None:
    """Run only the API server, in the foreground.

    It is configured by ZETA_DATABASE_URL, ZETA_REDIS_URL, ZETA_ARTIFACTS_URL, ZETA_API_KEY and ZETA_WORKER_SECRET.
    """
    exec_module("server", "server", "fastapi", host=host, port=port, home=home)


@app.command(rich_help_panel=SERVICE)
def migrate(home: Home = None) -> None:
    """Upgrade the database schema.

    The database is ZETA_DATABASE_URL, or SQLite in ZETA_HOME.
    """
    exec_module("migrations", "server", "alembic", home=home)


def exec_module(module: str, extra: str, package: str, options: Sequence[str] = (), **flags: object) -> None:
    """Replace this process with ``python -m module`` and its options. The flags are passed as ``ZETA_*`` settings."""
    import importlib.util
    import os
    import sys

    from zeta_core.contract.errors import InvalidSettings
    from zeta_core.system.settings import process_environment

    if importlib.util.find_spec(package) is None:
        raise InvalidSettings(
            f"{package} is not installed; run `pip install 'zeta-train[{extra}]'`.", code="missing_extra"
        )
    variables = process_environment()
    variables |= {f"ZETA_{name.upper()}": str(value) for name, value in flags.items() if value is not None}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-P", "-m", module, *options], variables)  # noqa: S606 - our own program


def _print_ready(state: UpState, settings: UpSettings, *, detached: bool, as_json: bool) -> None:
    from zeta.cli.output import print_json
    from zeta.client import Client
    from zeta.up.home import Home as HomeFolder
    from zeta_core.contract.errors import ZetaError

    if as_json:
        print_json(state)
        return
    folder = HomeFolder(settings.home)
    admin_key = settings.api_key or folder.secret(folder.admin_key, "zeta_")
    try:
        with Client(state.url, admin_key, patience_seconds=0, use_proxy=False, certificate=state.certificate) as client:
            dashboard = f"{client.login_link().url} (logs in once, within 10 minutes)"
    except ZetaError:  # the server is restarting, and the service continues
        dashboard = f"{state.url} (`zeta dashboard` prints a link that logs in)"
    key = str(folder.admin_key) if settings.api_key is None else "from ZETA_API_KEY"
    stop = "zeta down" if detached else "Ctrl-C"
    print(f"Zeta is ready at {state.url}")
    print(f"  dashboard  {dashboard}")
    print(f"  admin key  {key}")
    print(f"  logs       {folder.logs}")
    print(f"  stop       {stop}", flush=True)


def _processes(state: UpState) -> str:
    return ", ".join(f"{name} {pid}" for name, pid in state.children.items())


def _print_progress(sentence: str) -> None:
    import sys

    print(sentence, file=sys.stderr, flush=True)
