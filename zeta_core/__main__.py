"""``python -m zeta_core RUN_DIR`` trains a run directory; ``check`` dry-runs specs, and ``show`` prints rows."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

if __name__ == "__main__":
    match sys.argv[1:]:
        case ["check", file]:
            from zeta_core.dry_run import check

            sys.exit(check.main(file))
        case ["checks"]:
            from zeta_core.dry_run import check

            sys.exit(check.serve())
        case ["show"]:
            from zeta_core.dry_run import show

            sys.exit(show.main())
        case [run_dir]:
            from zeta_core.process import launch

            status = launch.main(Path(run_dir).absolute())
            gc.freeze()  # the interpreter collects garbage several times while it exits, which would take two seconds
            sys.exit(status)
        case _:
            sys.exit("usage: python -m zeta_core RUN_DIR | check FILE | checks | show")
