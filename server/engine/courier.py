"""Sends hand-overs through Celery: each worker consumes a queue of its own, and its task only takes the message in."""

from __future__ import annotations

import asyncio
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError as BrokerError

from server.engine.link import REDIS_AWAY, SOCKET_TIMEOUT_SECONDS
from zeta_core.contract.messages import START_TASK, HandOver, sign, worker_queue

NOT_SENT = (BrokerError, *REDIS_AWAY)


class Courier:
    """A Celery producer; it knows the task by its name only."""

    def __init__(self, redis_url: str, secret: str) -> None:
        self._secret = secret
        self._celery: Any = Celery("zeta", broker=redis_url, set_as_current=False)
        self._celery.conf.update(
            task_ignore_result=True,
            task_create_missing_queues=True,
            broker_connection_timeout=SOCKET_TIMEOUT_SECONDS,
            broker_transport_options={
                "socket_timeout": SOCKET_TIMEOUT_SECONDS,
                "socket_connect_timeout": SOCKET_TIMEOUT_SECONDS,
                "retry_on_timeout": False,
                "max_retries": 0,
                "interval_start": 0,
                "interval_max": 0,
            },
        )

    async def send(self, hand_over: HandOver) -> None:
        """Put the message into the worker's queue. Raises one of `NOT_SENT` within seconds; nothing is tried twice."""
        await asyncio.to_thread(self._send, hand_over)

    def close(self) -> None:
        self._celery.close()

    def _send(self, hand_over: HandOver) -> None:
        queue = worker_queue(hand_over.worker)
        # A connection of its own: those of a pool would, after an outage, fail one by one when Redis is back.
        with self._celery.connection_for_write() as connection:
            self._celery.send_task(
                START_TASK,
                args=[sign(hand_over, self._secret, channel=queue)],
                queue=queue,
                connection=connection,
                retry=False,
                ignore_result=True,
            )
