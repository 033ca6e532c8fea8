"""Group commit: concurrent requests share one transaction, and therefore one flush to the disk.

While a transaction commits, the next items queue up; together they form the next transaction. Nothing waits for a
timer, so a lone request has the latency of its own transaction. Guarantees: the result of an item is returned after the
transaction with its changes has been committed, and a failing item doesn't affect the others: if a transaction with
several items fails before its commit, each of them gets a transaction of its own. An item that fails alone because
another server inserted the same unique key is applied once more, and then sees what that server committed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.connections import Database

MAX_ITEMS = 64  # per transaction; it also limits how long other writers wait

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class _Pending(Generic[ItemT, ResultT]):
    item: ItemT
    result: asyncio.Future[ResultT]


class GroupCommit(Generic[ItemT, ResultT]):
    """Applies items in shared transactions, one transaction at a time.

    ``apply`` changes the database for several items and returns, in their order, the result of each, or the exception
    of an item for which it has changed nothing. Items with the same ``key`` never share a transaction; the second one
    sees what the first one has committed. ``None`` is not a key.
    """

    def __init__(
        self,
        database: Database,
        apply: Callable[[AsyncSession, Sequence[ItemT]], Awaitable[Sequence[ResultT | Exception]]],
        key: Callable[[ItemT], Hashable | None],
    ) -> None:
        self._database = database
        self._apply = apply
        self._key = key
        self._pending: list[_Pending[ItemT, ResultT]] = []
        self._committing: asyncio.Task[None] | None = None

    async def commit(self, item: ItemT) -> ResultT:
        """The result of the item, after its commit. Raises the item's exception, and `DatabaseUnavailable`."""
        result: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self._pending.append(_Pending(item, result))
        if self._committing is None or self._committing.done():
            self._committing = asyncio.create_task(self._commit_pending(), name="group-commit")
        return await result

    async def _commit_pending(self) -> None:
        try:
            while self._pending:
                await self._commit_group(self._next_group())
        finally:  # a cancelled task leaves nobody waiting
            for pending in self._pending:
                pending.result.cancel()

    def _next_group(self) -> list[_Pending[ItemT, ResultT]]:
        """Remove and return the oldest items that may share a transaction."""
        group: list[_Pending[ItemT, ResultT]] = []
        later: list[_Pending[ItemT, ResultT]] = []
        keys: set[Hashable] = set()
        for pending in self._pending:
            key = self._key(pending.item)
            if len(group) == MAX_ITEMS or (key is not None and key in keys):
                later.append(pending)
            else:
                group.append(pending)
                keys.add(key)
        self._pending = later
        return group

    async def _commit_group(self, group: Sequence[_Pending[ItemT, ResultT]], *, is_retry: bool = False) -> None:
        is_applied = False
        try:
            async with self._database.write() as session:
                results = await self._apply(session, [pending.item for pending in group])
                await session.flush()
                is_applied = True  # if the commit fails, it is unknown whether it took effect
        except Exception as error:  # noqa: BLE001 - the requests raise it
            if len(group) > 1 and not is_applied:
                await asyncio.gather(*(self._commit_group([pending]) for pending in group))
                return
            if isinstance(error, IntegrityError) and not is_applied and not is_retry:
                await self._commit_group(group, is_retry=True)
                return
            results = [error] * len(group)
        except BaseException:
            for pending in group:
                pending.result.cancel()
            raise
        for pending, result in zip(group, results, strict=True):
            if pending.result.done():
                continue  # the request was cancelled
            if isinstance(result, Exception):
                pending.result.set_exception(result)
            else:
                pending.result.set_result(result)
