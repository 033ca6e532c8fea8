"""The Celery consumer of this worker's queue. Its only task validates a dispatch and forwards it to the supervisor.

Messages are acknowledged early, because a late acknowledgement would start a long task again when the broker's
visibility timeout expires (celery issue 5935), and they are never prefetched behind a busy task. The server repeats
dispatches that are lost with this process, so nothing is returned to the queue, and an invalid entry is removed
permanently. The consumer runs in a thread, so that only the main thread's supervising loop handles signals.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import redis
from celery import Celery
from celery.worker import state
from kombu.exceptions import OperationalError
from pydantic import TypeAdapter

from worker.messaging.celery_connection import ConnectionHooks, amqp_with
from worker.messaging.link import InvalidEntryCounter, connect, remove_wrong_type
from worker.settings import WorkerSettings
from worker.threads import RetryingThread
from zeta_core.contract.wire.messages import START_TASK, Dispatch, queue_keys, worker_queue
from zeta_core.contract.wire.signatures import BadMessage, read_envelope
from zeta_core.system.outage import error_text
from zeta_core.system.redis_access import RedisAddress, RedisUnavailable
from zeta_core.system.replay_guard import ReplayGuard

SILENCE_SECONDS = 5.0  # more than kombu's blocking pop takes (`brpop_timeout`, 1 s), even if no message arrives
STOP_SECONDS = 3.0
EX_OK = 0

DISPATCH = TypeAdapter(Dispatch)


def _fields_in(message: object) -> object:
    """The first task argument of a raw message from the queue. Raises `BadMessage`."""
    try:
        arguments, *_ = json.loads(base64.b64decode(message["body"], validate=True))  # pyright: ignore
        return arguments[0]
    except (TypeError, KeyError, IndexError, ValueError, RecursionError) as error:
        raise BadMessage("it is not a task with a dispatch as its argument") from error


class _ErrorFilter(logging.Filter):
    """Removes critical errors, which Celery logs at every retry, from one of its logs and passes them to a callback."""

    def __init__(self, pass_on: Callable[[BaseException], None]) -> None:
        super().__init__()
        self._pass_on = pass_on

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if record.levelno < logging.CRITICAL or error is None:
            return True
        self._pass_on(error)
        return False


class Consumer:
    """Puts every valid `Dispatch` into ``inbox``."""

    def __init__(self, settings: WorkerSettings, inbox: SimpleQueue[Any]) -> None:
        self._queue = worker_queue(settings.worker_name)
        self._name = settings.worker_name
        self._key = settings.worker_key
        self._guard = ReplayGuard()
        self._redis_url = settings.redis_url
        self._inbox = inbox
        self.invalid = InvalidEntryCounter(f"the queue {self._queue}")
        self._failure: BaseException | None = None  # the error that stopped the controller
        self.thread = RetryingThread("celery", f"The queue {self._queue} cannot be read", self._one_pass)
        self._celery = self._build(settings.redis_url)

    def start(self) -> None:
        logging.getLogger("celery.worker").addFilter(
            _ErrorFilter(self._failed)
        )  # the error that stops a controller appears only in this log
        state.should_stop = None  # Celery keeps this flag for the whole process
        self.thread.start()

    def begin_to_stop(self) -> None:
        """Stop taking messages; they stay in the queue, and the server dispatches the jobs to other workers."""
        self.thread.stopped.set()
        state.should_stop = EX_OK

    def stop(self) -> None:
        self.begin_to_stop()
        self.thread.stop(STOP_SECONDS)

    def _build(self, redis_url: str) -> Any:
        address = RedisAddress.parse(redis_url)
        amqp = amqp_with(
            ConnectionHooks(
                take=self._take,
                removed=self.invalid.removed,
                polled=self._polled,
                reconnecting=self.thread.mark_progress,
                unreachable=self._unreachable,
            ),
            sentinel=address.sentinel is not None,
        )
        celery: Any = Celery("zeta", broker=address.celery_url, amqp=amqp, set_as_current=False)
        celery.conf.update(
            broker_connection_retry_on_startup=True,
            broker_connection_max_retries=None,
            broker_connection_timeout=2.0,
            broker_transport_options={
                "socket_connect_timeout": 2.0,
                "socket_timeout": SILENCE_SECONDS,  # without it, a connection that is never answered blocks forever
                "health_check_interval": SILENCE_SECONDS,  # kombu drops a connection whose blocking pop is overdue
                "socket_keepalive": True,
                **address.celery_options,
            },
            task_acks_late=False,
            task_ignore_result=True,
            worker_prefetch_multiplier=1,
            worker_disable_prefetch=True,
            worker_enable_remote_control=False,
            worker_hijack_root_logger=False,
            worker_redirect_stdouts=False,
            worker_send_task_events=False,
        )

        @celery.task(name=START_TASK, shared=False)
        def start(dispatch: str) -> None:  # pyright: ignore[reportUnusedFunction]
            self._inbox.put(Dispatch.model_validate_json(dispatch))

        return celery

    def _take(self, message: object) -> Dispatch | None:
        """The dispatch in a raw message; ``None`` if it has no valid signature for this worker, or is not new."""
        try:
            envelope = read_envelope(_fields_in(message))
            dispatch = envelope.open(DISPATCH, self._key, channel=self._queue)
            self._guard.check(envelope, object())  # every entry of the queue is read once
            return dispatch
        except BadMessage as error:
            self.invalid.removed(error)
            return None

    def _one_pass(self) -> None:
        """Run Celery until it stops, which only happens on an error. Raises that error."""
        self._failure = None
        self._celery.set_default()  # the pool's threads look up the task in the default app
        controller: Any = self._celery.WorkController(
            hostname=f"zeta@{self._name}",
            pool="threads",
            concurrency=1,
            queues=[self._queue],
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
        )
        controller.start()
        failure: BaseException | None = self._failed_with()
        if isinstance(failure, redis.ResponseError) and self._removed_wrong_types(failure):
            self.invalid.removed(failure)
        elif isinstance(failure, redis.RedisError | OSError | OperationalError):
            raise RedisUnavailable(error_text(failure)) from failure
        elif failure is not None:
            raise failure
        elif not self.thread.stopped.is_set():
            raise RuntimeError("Celery's consumer stopped unexpectedly")

    def _polled(self, failure: Exception | None) -> None:
        self.thread.mark_progress()
        if failure is None:
            self.thread.outage.end()
        else:
            self._failure = failure

    def _unreachable(self, error: BaseException) -> None:
        self.thread.outage.begin(error, is_expected=True)

    def _failed(self, error: BaseException) -> None:
        self._failure = error

    def _failed_with(self) -> BaseException | None:
        return self._failure

    def _removed_wrong_types(self, error: redis.ResponseError) -> bool:
        with connect(self._redis_url) as client:
            for key, kind in queue_keys(self._name).items():
                if not remove_wrong_type(client, key, kind, error):
                    return False
        return True
