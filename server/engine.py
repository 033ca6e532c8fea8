"""The engine of a server process: hands jobs over, answers claims, keeps the events, watches the workers.

One `Engine` per process, inside its event loop. Several servers on one PostgreSQL may each run one: every change is
made under the job's row lock and guarded by the state it expects, so whoever comes second changes nothing.
"""

from __future__ import annotations

import asyncio
from datetime import datetime

from server.db import Database
from server.settings import ServerSettings
from server.stored import Stored
from zeta_core.contract.messages import Heartbeat


class Engine:
    """What the HTTP side needs of it: `wake` after it queued or changed a job, `stored` to follow events, `workers`."""

    def __init__(self, database: Database, settings: ServerSettings) -> None:
        self.database = database
        self.settings = settings
        self.stored = Stored()
        self.redis_ok = False
        self._awake = asyncio.Event()

    async def start(self) -> None:
        """Start the loops; Redis and the database may be away, the loops wait for them."""

    async def stop(self) -> None:
        """End the loops; whatever was under way is taken up again by the next start."""

    def wake(self) -> None:
        """A job was queued, cancelled or resumed: look at the queue now."""
        self._awake.set()

    def workers(self) -> list[Heartbeat]:
        """The last heartbeat of every worker that is known, by name."""
        return []

    def last_seen_at(self, worker: str) -> datetime | None:
        """When this server saw the worker's newest heartbeat, on this server's clock."""
        return None

    def is_alive(self, worker: str) -> bool:
        """Whether the worker's heartbeat moved within the last `HEARTBEAT_GONE_SECONDS`."""
        return False
