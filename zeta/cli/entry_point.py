"""The entry point: imports the module of the command, runs it, and exits with its status."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

from zeta.cli.app import app
from zeta.cli.exit_status import ExitStatus
from zeta.cli.modules import MODULES
from zeta.cli.standard_streams import OutputError, prepare

MAX_HELP_WIDTH, PIPE_HELP_WIDTH = 100, 80  # in columns


def main() -> NoReturn:
    """Run the command in `sys.argv` and exit."""
    gc.set_threshold(50_000, 20, 20)  # importing creates many objects but no garbage
    # httpx imports its own command line with rich, pygments and click if they are installed. None makes that import
    # fail, which httpx expects.
    sys.modules["httpx._main"] = None  # pyright: ignore[reportArgumentType]
    prepare()
    status = _run(sys.argv[1:])
    with suppress(OutputError, OSError):  # `_run` has reported a failure to write the output
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the interpreter's own exit frees every object first


def add_commands(command: str | None = None) -> None:
    """Add a command to the app by importing its module; without the name of a known command, add all of them."""
    for module in [module for module, commands in MODULES.items() if command in commands] or MODULES:
        import_module(module)


def _run(arguments: Sequence[str]) -> int:
    # Looked up before parsing, because invalid arguments are also reported as JSON.
    as_json = "--json" in arguments[: arguments.index("--") if "--" in arguments else None]
    try:
        add_commands(next((argument for argument in arguments if not argument.startswith("-")), None))
        status = _run_app(arguments, as_json)
        sys.stdout.flush()  # a failure to flush at exit could not be reported
        return status
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - whatever it is, the user gets one sentence
        from zeta.cli.failures import report_failure

        return report_failure(error, as_json=as_json)


def _run_app(arguments: Sequence[str], as_json: bool) -> int:
    try:
        width = _help_width()
        ended: object = app(arguments, prog_name="zeta", standalone_mode=not as_json, terminal_width=width)
        return ended if isinstance(ended, int) else ExitStatus.SUCCEEDED
    except SystemExit as ended:  # click exits this way, also on usage errors
        return (
            ended.code
            if isinstance(ended.code, int)
            else ExitStatus.SUCCEEDED
            if ended.code is None
            else ExitStatus.FAILED
        )


def _help_width() -> int:
    """The width of help texts. typer would ask the original standard output, which `prepare` has replaced."""
    try:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return min(columns or PIPE_HELP_WIDTH, MAX_HELP_WIDTH)
