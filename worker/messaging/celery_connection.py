"""Celery's connection to the queue of this worker, which passes only verified dispatches to Celery.

Unexpected headers or arguments can make Celery wait for a task that never ends. So the raw message is verified when it
is read from the queue, and Celery gets a new message that contains only the dispatch.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty
from typing import Any

import redis
from celery.app.amqp import AMQP
from kombu.connection import Connection
from kombu.transport import redis as redis_transport

from zeta_core.contract.wire.messages import START_TASK, Dispatch

RECONNECT_SECONDS = 1.0


@dataclass(frozen=True)
class ConnectionHooks:
    """The functions that a connection calls. Celery creates connections itself, so they are set on their classes."""

    take: Callable[[object], Dispatch | None]  # the dispatch in a raw message; None if it must not be executed
    removed: Callable[[Exception], object]  # an entry that is not JSON was removed from the queue
    polled: Callable[[Exception | None], None]  # the queue was polled, with this error if any
    reconnecting: Callable[[], None]  # a new try to connect begins
    unreachable: Callable[[BaseException], None]  # a try to connect failed


def amqp_with(hooks: ConnectionHooks, *, sentinel: bool = False) -> type[AMQP]:
    """The class to create a `Celery` app with, so that its connections call ``hooks``.

    ``sentinel``: the connections ask Redis Sentinel for the address of the master.
    """

    base = redis_transport.SentinelTransport if sentinel else redis_transport.Transport

    class Amqp(AMQP):
        Connection = _connection_class(hooks, base)

    return Amqp


def _connection_class(hooks: ConnectionHooks, base: type[redis_transport.Transport]) -> type[Connection]:
    transport = _transport_class(hooks, base)

    class DispatchConnection(Connection):
        """Reconnects every second. Celery's own growing pauses delay it by up to 30 s after an outage."""

        def get_transport_cls(self) -> Any:
            return transport

        def ensure_connection(
            self,
            errback: Callable[[BaseException, float], None] | None = None,
            *args: Any,
            callback: Callable[[], None] | None = None,
            **kwargs: Any,
        ) -> Any:
            def called_each_second() -> None:
                hooks.reconnecting()
                if callback is not None:
                    callback()

            def failed(error: BaseException, pause_seconds: float) -> None:
                hooks.unreachable(error)
                if errback is not None:
                    errback(error, pause_seconds)

            pauses = {"interval_start": RECONNECT_SECONDS, "interval_step": 0, "interval_max": RECONNECT_SECONDS}
            return super().ensure_connection(failed, *args, **{**kwargs, **pauses, "callback": called_each_second})

    return DispatchConnection


def _transport_class(hooks: ConnectionHooks, base: type[redis_transport.Transport]) -> type[redis_transport.Transport]:
    channel: Any = base.Channel

    class DispatchChannel(channel):
        ack_emulation = False  # kombu would keep copies in keys shared by all workers and redeliver them an hour later
        do_restore = False

        def _brpop_read(self, **options: Any) -> Any:
            failure: Exception | None = None
            try:
                return super()._brpop_read(**options)
            except Empty:
                raise
            except (redis.RedisError, OSError) as error:
                failure = error
                raise
            except Exception as error:  # noqa: BLE001 - the entry isn't JSON; it is already removed
                hooks.removed(error)
                return True
            finally:
                hooks.polled(failure)

    class DispatchTransport(base):
        Channel = DispatchChannel

        def _deliver(self, message: object, queue: str) -> None:
            if (dispatch := hooks.take(message)) is not None:
                super()._deliver(_celery_message(dispatch, queue), queue)  # pyright: ignore[reportAttributeAccessIssue]

    return DispatchTransport


def _celery_message(dispatch: Dispatch, queue: str) -> dict[str, Any]:
    """A message of Celery's protocol 2 (https://docs.celeryq.dev/en/stable/internals/protocol.html)."""
    task_id = str(uuid.uuid4())
    body = json.dumps(
        [[dispatch.model_dump_json()], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    )
    return {
        "body": base64.b64encode(body.encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": START_TASK, "id": task_id, "root_id": task_id, "parent_id": None},
        "properties": {
            "correlation_id": task_id,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "delivery_tag": task_id,
            "body_encoding": "base64",
        },
    }
