"""Creates jobs once. A repeated request whose first response was lost returns the job that it created.

The client sends no idempotency key, but the number of its attempt in ``x-stainless-retry-count``. The first attempt
always creates a job, so two equal jobs can be created on purpose. A later attempt returns the newest job that the same
API key created from an equal body within `RETRY_SECONDS`, after waiting for earlier attempts that this server is still
processing. If two equal jobs are created within that time, a retry of the first request may return the second job; an
``Idempotency-Key`` header makes requests exact.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections import defaultdict
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from sqlalchemy import select

from server.auth import Caller
from server.database.tables import IdempotencyRow
from server.service import Service
from zeta_core.contract.job.events import utc_now

RETRY_SECONDS = 900.0  # longer than the client's timeout of 600 s and its longest wait of 120 s before a retry

_Request = tuple[str, str, str]  # the project, the API key and the digest of the body


class RepeatedRequests:
    """The requests to one route of one server process; ``prefix`` of the idempotency keys identifies the route."""

    def __init__(self, service: Service, prefix: str) -> None:
        self._service = service
        self._prefix = prefix
        self._in_progress: dict[_Request, set[asyncio.Event]] = defaultdict(set)

    async def create(
        self,
        caller: Caller,
        body: Any,
        create: Callable[[str], Awaitable[str]],
        *,
        attempt: int,
        idempotency_key: str | None,
    ) -> str:
        """The id of the job that ``create`` or an earlier attempt of this request has created.

        ``create`` is called with an idempotency key. ``attempt`` is the number of the client's retries so far.
        """
        digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        request = (caller.project, caller.key_id, digest)
        if idempotency_key is None:
            if attempt > 0 and (earlier := await self._earlier_job(request)) is not None:
                return earlier
            idempotency_key = f"{self._prefix}:{digest}:{secrets.token_hex(8)}"
        with self._progressing(request):
            return await create(idempotency_key)

    async def _earlier_job(self, request: _Request) -> str | None:
        """The newest job of an earlier attempt, once the attempts in progress are complete."""
        while self._in_progress[request]:
            await next(iter(self._in_progress[request])).wait()
        self._in_progress.pop(request, None)
        project, key_id, digest = request
        query = select(IdempotencyRow.job_id).where(
            IdempotencyRow.project == project,
            IdempotencyRow.key_id == key_id,
            IdempotencyRow.idempotency_key.startswith(f"{self._prefix}:{digest}:", autoescape=True),
            IdempotencyRow.created_at >= utc_now() - timedelta(seconds=RETRY_SECONDS),
        )
        async with self._service.database.read() as session:
            return await session.scalar(query.order_by(IdempotencyRow.created_at.desc()).limit(1))

    @contextmanager
    def _progressing(self, request: _Request) -> Generator[None]:
        done = asyncio.Event()
        self._in_progress[request].add(done)
        try:
            yield
        finally:
            done.set()
            self._in_progress[request].discard(done)
            if not self._in_progress[request]:
                del self._in_progress[request]
