"""Dispatches jobs to workers through Celery: each worker has its own queue, with a single task type."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from celery import Celery
from redis.asyncio import Redis

from server.engine.redis_client import remove_wrong_type
from server.engine.worker_secrets import WorkerSecrets
from zeta_core.contract.wire.messages import START_TASK, Dispatch, queue_keys, worker_queue
from zeta_core.contract.wire.signatures import sign
from zeta_core.system.redis_access import SOCKET_TIMEOUT_SECONDS, RedisAddress, calling_redis


class Dispatcher:
    """A Celery producer. It refers to the task by its name, because the server must not import worker code."""

    def __init__(self, redis_url: str, redis: Redis, secrets: WorkerSecrets) -> None:
        self._redis, self._secrets = redis, secrets
        self._producer: Any = None  # with an open connection; used by one thread at a time
        self._sending = threading.Lock()
        address = RedisAddress.parse(redis_url)
        self._celery: Any = Celery("zeta", broker=address.celery_url, set_as_current=False)
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
                **address.celery_options,
            },
        )

    async def send(self, dispatch: Dispatch) -> None:
        """Put the message into the worker's queue. Raises `RedisUnavailable` within seconds, without retries."""
        queue = worker_queue(dispatch.worker)
        signed = sign(dispatch, self._secrets.key_for_sending(dispatch.worker), channel=queue)
        with calling_redis():
            try:
                await asyncio.to_thread(self._send, queue, signed)
            except Exception as error:
                for key, kind in queue_keys(dispatch.worker).items():
                    await remove_wrong_type(self._redis, key, kind, error)
                raise

    def close(self) -> None:
        self._disconnect()
        self._celery.close()

    def _send(self, queue: str, signed: dict[str, str]) -> None:
        """Send on the one connection, which the first message opens and a failure closes.

        Opening a connection for each message took longer than everything else about a dispatch.
        """
        with self._sending:
            try:
                if self._producer is None:
                    self._producer = self._celery.connection_for_write().Producer(auto_declare=False)
                self._celery.send_task(
                    START_TASK,
                    args=[signed],
                    queue=queue,
                    producer=self._producer,
                    retry=False,
                    ignore_result=True,
                )
            except BaseException:
                self._disconnect()
                raise

    def _disconnect(self) -> None:
        if self._producer is not None:
            connection, self._producer = self._producer.connection, None
            connection.release()
