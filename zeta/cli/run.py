"""The entry point: run a command, and turn what it raises into a sentence, or JSON, and an exit status."""

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

# In this order `zeta --help` lists their commands.
# isort: off
from zeta.cli import submit, jobs, commands, artifacts, service, workers, login

# isort: on
from zeta.cli.app import app
from zeta.cli.exits import Exit, exit_of_error
from zeta.cli.streams import OutputError, discard_output, prepare
from zeta_core.contract.errors import AuthenticationFailed, InvalidRequest, ZetaError
from zeta_core.contract.printable import printable

COMMANDS = (
    submit,
    jobs,
    commands,
    artifacts,
    service,
    workers,
    login,
)  # each adds its own to the app when it is imported


# What the command line library raises for wrong usage, by its public subclass: with it or as a part of it comes click.
_WrongUsage: type[Exception] = typer.BadParameter.__mro__[2]


class Defect(ZetaError):
    """A fault of the command line's own."""

    type = "internal_error"
    code = "defect"


class SystemFault(ZetaError):
    """The machine refused something: a missing permission, a full disk, no free file descriptor."""

    type = "system_error"
    code = "system"


def main() -> NoReturn:
    """``zeta ...``: `sys.argv` decides, the process ends."""
    prepare()
    sys.exit(_run(sys.argv[1:]))


def _run(words: Sequence[str]) -> int:
    as_json = "--json" in words[: words.index("--") if "--" in words else None]  # known where the words are wrong, too
    try:
        status = _run_app(words, as_json)
        sys.stdout.flush()  # here, where a failure becomes a sentence
        return status
    except _WrongUsage as error:
        _tell(_of_usage(error), as_json)
        return Exit.USAGE
    except OutputError as error:
        discard_output()
        _tell(error, as_json)
        return Exit.FAILED
    except ZetaError as error:
        _tell(error, as_json)
        return exit_of_error(error)
    except KeyboardInterrupt:
        if not as_json:
            print("Interrupted.", file=sys.stderr)
        return Exit.INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        discard_output()
        return Exit.FAILED
    except OSError as error:
        named = f"{error.filename}: " if error.filename is not None else ""
        _tell(SystemFault(f"{named}{error.strerror or error}."), as_json)
        return Exit.FAILED
    except Exception as error:  # noqa: BLE001 - ours to fix; the user gets a sentence, and the rest in a file
        _tell(Defect(f"zeta has a defect ({error!r}); please report it{_report(error)}."), as_json)
        return Exit.FAILED


def _run_app(words: Sequence[str], as_json: bool) -> int:
    try:
        ended: object = app(words, prog_name="zeta", standalone_mode=not as_json)
        return ended if isinstance(ended, int) else Exit.SUCCEEDED
    except SystemExit as ended:  # how the command line library ends, usage errors included
        return ended.code if isinstance(ended.code, int) else Exit.SUCCEEDED if ended.code is None else Exit.FAILED


def _report(error: Exception) -> str:
    """Where the traceback was written, as the end of a sentence; empty where it cannot be written."""
    with contextlib.suppress(OSError):
        report = Path(tempfile.gettempdir()) / f"zeta-defect-{os.getpid()}.txt"
        report.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
        return f" with {report}"
    return ""


def _of_usage(error: Any) -> InvalidRequest:
    """Wrong usage in the contract's shape: which option or argument, what is wrong with it, and the cure."""
    parameter = getattr(error, "param", None)
    names: Sequence[str] = getattr(parameter, "opts", None) or [getattr(error, "option_name", None) or ""]
    command = error.ctx.command_path if error.ctx is not None else "zeta"
    sentence = str(error.format_message()).strip().removesuffix(".")
    similar: Sequence[str] = getattr(error, "possibilities", None) or ()
    return InvalidRequest(
        f"{sentence}; `{command} --help` says what there is.",
        code="invalid_usage",
        param=names[-1] or None,
        suggestion=similar[0] if similar else None,
    )


def _tell(error: ZetaError, as_json: bool) -> None:
    """The error's sentence, and the other faults of the same request where it has several; or its JSON, in one line."""
    if as_json:
        print(error.body().model_dump_json(), file=sys.stderr)
        return
    print(printable(f"Error: {error.message}", keep="\n"), file=sys.stderr)
    if isinstance(
        error, AuthenticationFailed
    ):  # the server's sentence speaks of HTTP; this is where our key comes from
        print("The key comes from ZETA_API_KEY or `zeta login URL`; `zeta config` says what is used.", file=sys.stderr)
    if len(error.details) > 1:
        for detail in error.details:
            print(printable(f"  - {detail.message}"), file=sys.stderr)
