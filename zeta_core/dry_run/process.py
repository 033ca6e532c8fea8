"""``python -m zeta_core check FILE``: dry-run a spec without training or weights, and check the rows of its data.

``python -m zeta_core checks`` checks several files. It reads their paths from standard input, one per line, until the
input is closed or idle for `IDLE_SECONDS`. The imports, which take seconds, are then needed only once.

Guarantees: standard output contains one JSON object per file, a `CheckAnswer`, whatever libraries print. The caller
limits the time.

FILE is a ``run.json``, where only ``spec`` is required, or a spec alone; ``-`` is standard input.
"""

from __future__ import annotations

import importlib
import os
import select
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.job.check import CheckAnswer
from zeta_core.contract.wire.run_directory import OUT_OF_MEMORY_EXIT
from zeta_core.contract.wire.sandbox import SANDBOX_FILE
from zeta_core.dry_run.check import check, error_details, ran_out_of_memory
from zeta_core.environment import standard_output_reserved
from zeta_core.failures import tokenizer_failure
from zeta_core.system import sandbox

IDLE_SECONDS = 300.0  # for which `serve` waits for the next file


def main(source: str) -> int:
    """Print the answer. Returns the exit code: 0 for a valid spec, otherwise 1. May exit with `OUT_OF_MEMORY_EXIT`."""
    with standard_output_reserved() as out:
        answer = _answer(lambda: sys.stdin.read() if source == "-" else Path(source).read_text())
        out.write(answer.model_dump_json() + "\n")
    return 0 if answer.ok else 1


def serve() -> int:
    """Print the answer for each path on standard input before reading the next one.

    A check that runs out of memory ends the process with `OUT_OF_MEMORY_EXIT`, because memory that it has not freed
    would be missing in the next check. With a sandbox, each check runs in a forked process, which can access only the
    files of that check. This process imports the libraries for it, and ends as the forked one does if that fails.
    """
    with standard_output_reserved() as out, os.fdopen(0, "rb", buffering=0, closefd=False) as paths:
        while select.select([paths], [], [], IDLE_SECONDS)[0] and (path := paths.readline()):
            file = Path(os.fsdecode(path.rstrip(b"\n")))
            if (file.parent / SANDBOX_FILE).exists():
                _import_libraries()
                if (status := _answer_confined(file, out)) != 0:
                    if status < 0:
                        os.kill(os.getpid(), -status)
                    return status
                continue
            answer = _answer(file.read_text)
            out.write(answer.model_dump_json() + "\n")
            out.flush()
    return 0


def _import_libraries() -> None:
    """Import what most checks need. They must not start threads, because the forked process would lack them."""
    importlib.import_module("torch")
    importlib.import_module("transformers")
    importlib.import_module("zeta_core.model.preparation")
    importlib.import_module("zeta_core.data.row_check")
    importlib.import_module("zeta_core.memory.estimate")
    importlib.import_module("zeta_core.parallel.zero")


def _answer_confined(file: Path, out: TextIO) -> int:
    """Print the answer from a forked process in the sandbox of ``file``; returns its exit status (`Popen`'s)."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        sandbox.enter(file.parent)
        out.write(_answer(file.read_text).model_dump_json() + "\n")
        out.flush()
        status = 0
    except SystemExit as exit_request:
        status = exit_request.code if isinstance(exit_request.code, int) else 1
    except BaseException as error:  # noqa: BLE001 - the process must not continue as a second reader of requests
        traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    os._exit(status)


def _answer(read: Callable[[], str]) -> CheckAnswer:
    try:
        return check(read())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the caller reads JSON; the traceback is for people
        if ran_out_of_memory(error):
            raise SystemExit(OUT_OF_MEMORY_EXIT) from error
        traceback.print_exception(error, file=sys.stderr)
        if (failure := tokenizer_failure(error)) is not None:  # a panic of the Rust library is not an `Exception`
            return CheckAnswer(ok=False, details=error_details(failure))
        message = f"The check itself failed: {type(error).__name__}: {error}"
        return CheckAnswer(ok=False, details=[ErrorDetail(message=message, code="check_failed")])
