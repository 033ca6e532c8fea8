"""``python -m zeta_core RUN_DIR`` trains a run directory; ``fork-server`` starts runs by forking itself.

``serve RUN_DIR`` keeps a model loaded and answers requests, and ``batch RUN_DIR`` answers the requests of a file.
``export RUN_DIR`` exports a checkpoint, and ``evaluate RUN_DIR`` measures one on the documents of a file. ``check`` and
``checks`` dry-run specs, ``show`` prints rows of data, and ``ask`` prints a model's answers.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from zeta_core.contract.job.kind import KINDS


class QuickExit:
    """Exits after the last exit handler instead of tearing down all modules, which takes up to two seconds.

    Threads have been joined and handlers have run by then, as in an ordinary exit.
    """

    def __init__(self) -> None:
        """Create it before the libraries are imported: handlers run in the reverse order of their registration."""
        self._status: int | None = None
        atexit.register(self._exit)

    def __call__(self, status: int) -> NoReturn:
        self._status = status
        sys.exit(status)

    def _exit(self) -> None:
        if self._status is not None:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # a full disk, or closed
                    stream.flush()
            os._exit(self._status)


def enter_sandbox(arguments: Sequence[str]) -> None:
    """Restrict this process if it runs a job of any kind in a run directory with a sandbox file."""
    if any((*rules.arguments, arguments[-1]) == tuple(arguments) for rules in KINDS.values() if arguments):
        from zeta_core.system import sandbox

        sandbox.enter(Path(arguments[-1]))


if __name__ == "__main__":
    quick_exit = QuickExit()
    enter_sandbox(sys.argv[1:])
    match sys.argv[1:]:
        case ["check", file]:
            from zeta_core.dry_run import process

            sys.exit(process.main(file))
        case ["checks"]:
            from zeta_core.dry_run import process

            sys.exit(process.serve())
        case ["show"]:
            from zeta_core.dry_run import show

            sys.exit(show.main())
        case ["fork-server", _mark]:
            from zeta_core.process import fork_server, launch

            if (run_directory := fork_server.serve()) is not None:
                quick_exit(launch.main(run_directory))
        case ["ask", model, *questions]:
            from zeta_core import ask

            sys.exit(ask.main(model, questions))
        case ["serve", run_dir]:
            from zeta_core.serve import process

            quick_exit(process.main(Path(run_dir).absolute()))
        case ["export", run_dir]:
            from zeta_core.export.process import export_checkpoint
            from zeta_core.process import launch

            quick_exit(launch.main(Path(run_dir).absolute(), export_checkpoint))
        case ["batch", run_dir]:
            from zeta_core.batches.process import answer_batch
            from zeta_core.process import launch

            quick_exit(launch.main(Path(run_dir).absolute(), answer_batch))
        case ["evaluate", run_dir]:
            from zeta_core.evaluations.process import evaluate
            from zeta_core.process import launch

            quick_exit(launch.main(Path(run_dir).absolute(), evaluate))
        case [run_dir]:
            from zeta_core.process import launch

            quick_exit(launch.main(Path(run_dir).absolute()))
        case _:
            modes = (
                "RUN_DIR | export RUN_DIR | serve RUN_DIR | batch RUN_DIR | evaluate RUN_DIR | check FILE | checks | "
                "show | ask MODEL [QUESTION ...]"
            )
            sys.exit(f"usage: python -m zeta_core {modes}")
