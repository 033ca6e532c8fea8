"""The entry point: run a command, and turn what it raises into a sentence and an exit status."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NoReturn

# In this order `zeta --help` lists their commands.
# isort: off
from zeta.cli import submit, jobs, commands, artifacts, service, workers, login

# isort: on
from zeta.cli.app import app
from zeta.cli.exits import Exit, exit_of_error
from zeta_core.contract.errors import AuthenticationFailed, ZetaError

COMMANDS = (
    submit,
    jobs,
    commands,
    artifacts,
    service,
    workers,
    login,
)  # each adds its own to the app when it is imported


def main() -> NoReturn:
    """``zeta ...``: `sys.argv` decides, the process ends."""
    sys.exit(_run())


def _run() -> int:
    try:
        app(prog_name="zeta")
    except SystemExit as ended:  # how the command line library ends, usage errors included
        return ended.code if isinstance(ended.code, int) else Exit.SUCCEEDED if ended.code is None else Exit.FAILED
    except ZetaError as error:
        _tell(error)
        return exit_of_error(error)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return Exit.INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.FAILED
    except Exception as error:  # noqa: BLE001 - ours to mend; the user gets a sentence, and the rest in a file
        report = Path(tempfile.gettempdir()) / f"zeta-defect-{os.getpid()}.txt"
        report.write_text("".join(traceback.format_exception(error)))
        print(f"Error: a defect of zeta ({error!r}); please report it with {report}.", file=sys.stderr)
        return Exit.FAILED
    return Exit.SUCCEEDED


def _tell(error: ZetaError) -> None:
    """The error's sentence, and the other faults of the same request where it has several."""
    print(f"Error: {error.message}", file=sys.stderr)
    if isinstance(
        error, AuthenticationFailed
    ):  # the server's sentence speaks of HTTP; this is where our key comes from
        print("The key comes from ZETA_API_KEY or `zeta login URL`; `zeta config` says what is used.", file=sys.stderr)
    if len(error.details) > 1:
        for detail in error.details:
            print(f"  - {detail.message}", file=sys.stderr)
