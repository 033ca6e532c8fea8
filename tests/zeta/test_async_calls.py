"""Streams of the client for asyncio: their thread passes on every error, and ends without an error of its own."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from tests.harness.waiting import wait_until
from zeta.async_calls import AsyncPart, client_threads, streamed


class Numbers:
    """A blocking object with streams."""

    def failing(self) -> Iterator[int]:
        yield 1
        raise RuntimeError("the connection pool is closed")

    def endless(self) -> Iterator[int]:
        while True:
            yield 1


class AsyncNumbers(AsyncPart):
    failing = streamed(Numbers.failing)
    endless = streamed(Numbers.endless)


async def read_failing(received: list[int]) -> None:
    async for number in AsyncNumbers(Numbers(), client_threads()).failing():
        received.append(number)


async def read_one() -> int:
    async for number in AsyncNumbers(Numbers(), client_threads()).endless():
        return number
    raise AssertionError("the stream has ended")


def test_a_runtime_error_of_a_stream_is_raised_instead_of_waiting_for_ever() -> None:
    received: list[int] = []
    with pytest.raises(RuntimeError, match="pool is closed"):
        asyncio.run(asyncio.wait_for(read_failing(received), 10))
    assert received == [1]


def test_the_thread_of_a_stream_that_is_left_ends_with_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    before = set(threading.enumerate())
    for _ in range(20):
        assert asyncio.run(read_one()) == 1

    def streams() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "zeta-stream"} - before

    wait_until(lambda: not streams(), 10, "the threads to end")
    assert not failures
