"""Calling the methods of a blocking client from asyncio: each call, and each stream, runs in a thread.

    class AsyncSweeps(AsyncPart):
        get = awaitable(Sweeps.get)  # `await sweeps.get(sweep_id)`

The methods made here have the parameters, the defaults and the docstring of the blocking method, so these are written
once. Callbacks (parameters whose names begin with ``on_``) are called in the thread of the event loop.

A cancelled task stops waiting at once; a request that was sent completes in its thread, and its result is ignored.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial, wraps
from inspect import signature
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

MAX_CONCURRENT_CALLS = 32  # further calls wait; streams have threads of their own

P = ParamSpec("P")
ResultT = TypeVar("ResultT")
ConvertedT = TypeVar("ConvertedT")
ItemT = TypeVar("ItemT")


class AsyncPart:
    """The base of classes whose methods call those of ``blocking`` in threads."""

    def __init__(self, blocking: Any, threads: ThreadPoolExecutor) -> None:
        self._blocking = blocking
        self._threads = threads

    async def _call(self, method: Callable[..., ResultT], *args: Any, **kwargs: Any) -> ResultT:
        """The result of ``method`` of the blocking object."""
        loop = asyncio.get_running_loop()
        call = partial(method, self._blocking, *args, **_in_loop(kwargs, loop))
        return await loop.run_in_executor(self._threads, call)


def client_threads() -> ThreadPoolExecutor:
    """The threads of one client. They end when the client is garbage-collected."""
    return ThreadPoolExecutor(MAX_CONCURRENT_CALLS, thread_name_prefix="zeta-client")


def awaitable(
    method: Callable[Concatenate[Any, P], ResultT],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, ResultT]]:
    """A coroutine function that calls the blocking method."""
    return converted(method, lambda _, result: result)


def converted(
    method: Callable[Concatenate[Any, P], ResultT], convert: Callable[[Any, ResultT], ConvertedT]
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, ConvertedT]]:
    """A coroutine function that calls the blocking method, and converts its result with ``convert(self, result)``."""

    @wraps(method)
    async def call(self: AsyncPart, *args: P.args, **kwargs: P.kwargs) -> ConvertedT:
        return convert(self, await self._call(method, *args, **kwargs))  # pyright: ignore[reportPrivateUsage]

    return _described(call, method)


def streamed(
    method: Callable[Concatenate[Any, P], Iterator[ItemT]],
) -> Callable[Concatenate[Any, P], AsyncIterator[ItemT]]:
    """A method that yields the items of a blocking method's iterator, which a thread reads."""

    @wraps(method)
    async def stream(self: AsyncPart, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[ItemT]:
        callbacks = _in_loop(kwargs, asyncio.get_running_loop())
        blocking = self._blocking  # pyright: ignore[reportPrivateUsage]
        async for item in _items(partial(method, blocking, *args, **callbacks)):
            yield item

    return _described(stream, method)


def _described(made: Callable[..., Any], method: Callable[..., Any]) -> Any:
    """``made`` with the parameters of ``method``, but without its return type, which differs."""
    cast("Any", made).__signature__ = signature(method).replace(return_annotation=signature(made).empty)
    return made


def _in_loop(kwargs: dict[str, Any], loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
    """The arguments, with callbacks that are called in the thread of the loop."""
    return {
        name: partial(loop.call_soon_threadsafe, value) if name.startswith("on_") and callable(value) else value
        for name, value in kwargs.items()
    }


async def _items(open_stream: Callable[[], Iterator[ItemT]]) -> AsyncIterator[ItemT]:
    """The items of a blocking iterator, which a thread reads one at a time, as they are requested.

    The thread is a daemon: if the caller stops early, it ends with the next item and never delays the program's end.
    """
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[tuple[ItemT | None, BaseException | None]] = asyncio.Queue(maxsize=1)
    stopped = threading.Event()

    def send(item: ItemT | None, error: BaseException | None) -> bool:
        """Returns False if nobody reads the items any more."""
        if stopped.is_set():
            return False
        put = items.put((item, error))
        try:
            asyncio.run_coroutine_threadsafe(put, loop).result()
        except RuntimeError:  # the loop was closed
            put.close()
            return False
        except CancelledError:  # the loop cancels its tasks because it ends
            return False
        return True

    def read() -> None:
        try:
            for item in open_stream():
                if not send(item, None):
                    return
        except Exception as error:  # noqa: BLE001 - the caller gets it
            send(None, error)
        else:
            send(None, StopAsyncIteration())

    threading.Thread(target=read, name="zeta-stream", daemon=True).start()
    try:
        while True:
            item, error = await items.get()
            if isinstance(error, StopAsyncIteration):
                return
            if error is not None:
                raise error
            assert item is not None
            yield item
    finally:
        stopped.set()
        if not items.empty():
            items.get_nowait()  # the thread may be waiting for space
