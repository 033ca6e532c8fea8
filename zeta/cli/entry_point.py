"""The entry point: runs a command and turns exceptions into an error message (text or JSON) and an exit status."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer

# `zeta --help` lists the commands in this order.
# isort: off
from zeta.cli import submit, data, jobs, job_commands, artifacts, service, workers, login

# isort: on
from zeta.cli.app import app
from zeta.cli.exit_status import ExitStatus, exit_status_of_error
from zeta.cli.standard_streams import OutputError, discard_output, prepare
from zeta_core.contract.errors import AuthenticationFailed, InvalidRequest, ZetaError
from zeta_core.contract.printable import printable

COMMANDS = (
    submit,
    data,
    jobs,
    job_commands,
    artifacts,
    service,
    workers,
    login,
)  # importing a module adds its commands to the app


# click.UsageError. It is taken from typer's subclass because some versions of typer contain their own copy of click.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


class Defect(ZetaError):
    """A bug in the command line itself."""

    type = "internal_error"
    code = "defect"


class SystemFault(ZetaError):
    """An operating system error, such as a missing permission, a full disk or too many open files."""

    type = "system_error"
    code = "system"


def main() -> NoReturn:
    """Run the command in `sys.argv` and exit."""
    prepare()
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: Sequence[str]) -> int:
    # Looked up before parsing, because invalid arguments are also reported as JSON.
    as_json = "--json" in arguments[: arguments.index("--") if "--" in arguments else None]
    try:
        status = _run_app(arguments, as_json)
        sys.stdout.flush()  # a failure to flush at exit could not be reported
        return status
    except _UsageError as error:
        _print_error(_usage_error(error), as_json)
        return ExitStatus.USAGE
    except OutputError as error:
        discard_output()
        _print_error(error, as_json)
        return ExitStatus.FAILED
    except ZetaError as error:
        _print_error(error, as_json)
        return exit_status_of_error(error)
    except KeyboardInterrupt:
        if not as_json:
            print("Interrupted.", file=sys.stderr)
        return ExitStatus.INTERRUPTED
    except BrokenPipeError:  # the reader of the output (head, less) closed the pipe
        discard_output()
        return ExitStatus.FAILED
    except OSError as error:
        prefix = f"{error.filename}: " if error.filename is not None else ""
        _print_error(SystemFault(f"{prefix}{error.strerror or error}."), as_json)
        return ExitStatus.FAILED
    except Exception as error:  # noqa: BLE001 - a bug: the user gets one sentence, and the traceback in a file
        _print_error(Defect(f"This is a bug in zeta ({error!r}); please report it{_report(error)}."), as_json)
        return ExitStatus.FAILED


def _run_app(arguments: Sequence[str], as_json: bool) -> int:
    try:
        ended: object = app(arguments, prog_name="zeta", standalone_mode=not as_json)
        return ended if isinstance(ended, int) else ExitStatus.SUCCEEDED
    except SystemExit as ended:  # click exits this way, also on usage errors
        return (
            ended.code
            if isinstance(ended.code, int)
            else ExitStatus.SUCCEEDED
            if ended.code is None
            else ExitStatus.FAILED
        )


def _report(error: Exception) -> str:
    """Write the traceback to a file and name it, as the end of a sentence; empty if it cannot be written."""
    with contextlib.suppress(OSError):
        report = Path(tempfile.gettempdir()) / f"zeta-defect-{os.getpid()}.txt"
        report.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
        return f" with {report}"
    return ""


def _usage_error(error: Any) -> InvalidRequest:
    """A usage error as an error of the contract, with the option or argument, the reason and the fix."""
    parameter = getattr(error, "param", None)
    names: Sequence[str] = getattr(parameter, "opts", None) or [getattr(error, "option_name", None) or ""]
    command = error.ctx.command_path if error.ctx is not None else "zeta"
    sentence = str(error.format_message()).strip().removesuffix(".")
    similar: Sequence[str] = getattr(error, "possibilities", None) or ()
    return InvalidRequest(
        f"{sentence}; see `{command} --help`.",
        code="invalid_usage",
        param=names[-1] or None,
        suggestion=similar[0] if similar else None,
    )


def _print_error(error: ZetaError, as_json: bool) -> None:
    """Print the error's message and details, or its JSON on one line."""
    if as_json:
        print(error.body().model_dump_json(), file=sys.stderr)
        return
    if len(error.details) > 1:  # the message contains only the first of them
        from zeta_core.contract.spec.validation import MAX_DETAILS

        at_least = "at least " if len(error.details) == MAX_DETAILS else ""
        print(f"Error: Found {at_least}{len(error.details)} problems:", file=sys.stderr)
        for detail in error.details:
            print(printable(f"  - {detail.message}"), file=sys.stderr)
        return
    print(printable(f"Error: {error.message}", keep="\n"), file=sys.stderr)
    if isinstance(error, AuthenticationFailed):  # the server does not know the key's source
        print("The key comes from ZETA_API_KEY or `zeta login URL`; `zeta config` shows which.", file=sys.stderr)
