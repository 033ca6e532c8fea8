"""The protection of ``ZETA_HOME``, which contains the service's secrets, database and caches of compiled code."""

from __future__ import annotations

import stat
from pathlib import Path

from zeta_core.contract.errors import InvalidSettings


def require_protected(home: Path) -> None:
    """Raise `InvalidSettings` if every user of this machine can write to an existing home folder.

    They could replace the secrets in it, and the code that jobs run. Write access of the folder's group is allowed,
    because volumes of Kubernetes and home folders of user-private groups have it.
    """
    try:
        mode = stat.S_IMODE(home.stat().st_mode)
    except OSError:
        return  # it is created later, or reported as unusable
    if mode & stat.S_IWOTH:
        raise InvalidSettings(
            f"ZETA_HOME is {str(home)!r}, and every user of this machine can write to it (mode {mode:04o}); "
            f"run `chmod o-w` on it, or choose another folder with --home or ZETA_HOME.",
            param="ZETA_HOME",
        )
