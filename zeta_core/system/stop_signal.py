"""The interface of `zeta_core.process.stop` for code that must not import it: batches, evaluations and exports."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from zeta_core.contract.job.status import StopAction


class StopSignal(Protocol):
    """Calling it returns the requested stop action, if there is one."""

    def __call__(self) -> StopAction | None: ...

    def deferred(self) -> AbstractContextManager[None]:
        """Defer SIGTERM while libraries are imported."""
        ...

    def on_training_start(self) -> None:
        """Let the run stop by itself from now on."""
