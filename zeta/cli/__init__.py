"""The `zeta` command. It reports every failure as one sentence on standard error (with ``--json``, as the API's error
object on one line) and an exit status, never as a traceback.

0 succeeded, 1 failed, 2 invalid usage, 3 cancelled, 4 service unreachable, 130 interrupted with Ctrl-C.
"""

from zeta.cli.entry_point import main

__all__ = ["main"]
