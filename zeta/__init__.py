"""The public API: ``Trainer`` for scripts, ``Client`` and ``AsyncClient`` for a service. Each is imported on use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zeta.async_client import AsyncClient as AsyncClient
    from zeta.client import Client as Client
    from zeta.trainer import Trainer as Trainer

__all__ = ["AsyncClient", "Client", "Trainer"]


def __getattr__(name: str) -> Any:
    if name == "Trainer":
        from zeta.trainer import Trainer

        return Trainer
    if name == "Client":
        from zeta.client import Client

        return Client
    if name == "AsyncClient":
        from zeta.async_client import AsyncClient

        return AsyncClient
    raise AttributeError(f"module 'zeta' has no attribute {name!r}")
