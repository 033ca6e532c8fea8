"""The `zeta` command. It reports every failure as one sentence on standard error (with ``--json``, as the API's error
object on one line) and an exit status, never as a traceback.

0 succeeded, 1 failed, 2 invalid usage, 3 cancelled, 4 service unreachable, 130 interrupted with Ctrl-C.

Starting takes most of the time of a short command, so each command imports only what it needs: `entry_point` imports
only the module that defines the command, and the function of the command imports its dependencies when it is called,
as the methods of `zeta.client.Client` do. At the top of a module are only imports that every command needs.
"""

from zeta.cli.entry_point import main

__all__ = ["main"]
