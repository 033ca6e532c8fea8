"""The public API: ``Trainer`` for scripts and ``Client`` for a service. Importing this package loads neither."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zeta.client import Client as Client
    from zeta.trainer import Trainer as Trainer

__all__ = ["Client", "Trainer"]


def __getattr__(name: str) -> Any:
    if name == "Trainer":
        from zeta.trainer import Trainer

        return Trainer
    if name == "Client":
        from zeta.client import Client

        return Client
    raise AttributeError(f"module 'zeta' has no attribute {name!r}")
