"""Reporting failures: the exception that ended a command becomes an error message (text or JSON) and an exit status."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any

import typer

from zeta.cli.exit_status import ExitStatus
from zeta.cli.standard_streams import OutputError, discard_output
from zeta_core.contract.errors import (
    AuthenticationFailed,
    InvalidRequest,
    InvalidSettings,
    MalformedRequest,
    Unavailable,
    ZetaError,
)
from zeta_core.contract.printable import printable

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


class OutputFault(ZetaError):
    """Standard output cannot be written."""

    type = "output_error"
    code = "output"


def report_failure(error: BaseException, *, as_json: bool) -> ExitStatus:
    """Report the exception that ended a command, and return the exit status."""
    if isinstance(error, KeyboardInterrupt):
        if not as_json:
            print("Interrupted.", file=sys.stderr)
        return ExitStatus.INTERRUPTED
    if isinstance(error, BrokenPipeError):  # the reader of the output (head, less) closed the pipe
        discard_output()
        return ExitStatus.FAILED
    if isinstance(error, OutputError):
        discard_output()
    found = _as_zeta_error(error)
    _print_error(found, as_json)
    return ExitStatus.USAGE if isinstance(error, _UsageError) else exit_status_of_error(found)


def exit_status_of_error(error: ZetaError) -> ExitStatus:
    """2 for invalid input (arguments, spec, settings), 4 for an unreachable service, 1 for everything else."""
    if error.code == "unreachable" or (isinstance(error, Unavailable) and error.code == Unavailable.code):
        return ExitStatus.UNREACHABLE
    if isinstance(error, InvalidRequest | MalformedRequest | InvalidSettings):
        return ExitStatus.USAGE
    return ExitStatus.FAILED


def _as_zeta_error(error: BaseException) -> ZetaError:
    if isinstance(error, ZetaError):
        return error
    if isinstance(error, _UsageError):
        return _usage_error(error)
    if isinstance(error, OutputError):
        return OutputFault(str(error))
    if isinstance(error, OSError):
        prefix = f"{error.filename}: " if error.filename is not None else ""
        return SystemFault(f"{prefix}{error.strerror or error}.")
    # A bug: the user gets one sentence, and the traceback in a file.
    return Defect(f"This is a bug in zeta ({error!r}); please report it{_report(error)}.")


def _report(error: BaseException) -> str:
    """Write the traceback to a file and name it, as the end of a sentence; empty if it cannot be written."""
    with contextlib.suppress(OSError):
        text = "".join(traceback.format_exception(error))
        # An unpredictable name, which no other user of the machine can create first, and mode 0600.
        descriptor, report = tempfile.mkstemp(prefix="zeta-defect-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
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


def _print_text(text: str, indent: int = 2) -> None:
    from zeta.cli.output import for_terminal

    print(for_terminal(text, sys.stderr, indent), file=sys.stderr)


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
            _print_text(printable(f"  - {detail.message}"), indent=4)
        return
    _print_text(printable(f"Error: {error.message}", keep="\n"))
    if isinstance(error, AuthenticationFailed):  # the server does not know the key's source
        print("The key comes from ZETA_API_KEY or `zeta login URL`; `zeta config` shows which.", file=sys.stderr)
