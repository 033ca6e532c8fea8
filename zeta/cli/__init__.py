"""The `zeta` command. Every failure is one sentence on standard error (with ``--json`` the API's error object in one
line) and an exit status; never a traceback.

0 succeeded, 1 failed, 2 wrong usage, 3 cancelled, 4 the service cannot be reached, 130 left with Ctrl-C.
"""

from zeta.cli.run import main

__all__ = ["main"]
