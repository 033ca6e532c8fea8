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
import uuid
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

import redis
from celery import Celery
from celery.app.amqp import AMQP
from celery.worker import state
from kombu.connection import Connection
from kombu.exceptions import OperationalError
from kombu.transport import redis as redis_transport
from pydantic import TypeAdapter

from worker.messaging.link import InvalidEntryCounter, connect, remove_wrong_type
from worker.settings import WorkerSettings
from worker.threads import RetryingThread
from zeta_core.contract.wire.messages import START_TASK, Dispatch, queue_keys, worker_queue
from zeta_core.contract.wire.signatures import BadMessage, read_envelope
from zeta_core.system.outage import error_text
from zeta_core.system.redis_access import RedisAddress, RedisUnavailable
from zeta_core.system.replay_guard import ReplayGuard

RECONNECT_SECONDS = 1.0
SILENCE_SECONDS = 5.0  # more than kombu's blocking pop takes (`brpop_timeout`, 1 s), even if no message arrives
STOP_SECONDS = 3.0
EX_OK = 0

DISPATCH = TypeAdapter(Dispatch)


def _amqp_for_dispatches(
    take: Callable[[object], Dispatch | None],
    invalid: InvalidEntryCounter,
    polled: Callable[[Exception | None], None],
    reconnecting: Callable[[], None],
    unreachable: Callable[[BaseException], None],
) -> type[AMQP]:
    """Connections that pass only dispatches to Celery.

    ``polled`` is called after each poll, with its error if any, ``reconnecting`` at each try to connect again, and
    ``unreachable`` with the error of each try that failed.

    Unexpected headers or arguments can make Celery wait for a task that never ends. So ``take`` verifies the raw
    message from the queue, and Celery gets a new message that contains only the dispatch that ``take`` returns.
    """

    class DispatchChannel(redis_transport.Channel):
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
                invalid.removed(error)
                return True
            finally:
                polled(failure)

    class DispatchTransport(redis_transport.Transport):
        def _deliver(self, message: object, queue: str) -> None:
            if (dispatch := take(message)) is not None:
                super()._deliver(_celery_message(dispatch, queue), queue)  # pyright: ignore[reportAttributeAccessIssue]

    DispatchTransport.Channel = DispatchChannel

    class DispatchConnection(Connection):
        """Reconnects every second. Celery's own growing pauses delay it by up to 30 s after an outage."""

        def get_transport_cls(self) -> Any:
            return DispatchTransport

        def ensure_connection(
            self,
            errback: Callable[[BaseException, float], None] | None = None,
            *args: Any,
            callback: Callable[[], None] | None = None,
            **kwargs: Any,
        ) -> Any:
            def called_each_second() -> None:
                reconnecting()
                if callback is not None:
                    callback()

            def failed(error: BaseException, pause_seconds: float) -> None:
                unreachable(error)
                if errback is not None:
                    errback(error, pause_seconds)

            pauses = {"interval_start": RECONNECT_SECONDS, "interval_step": 0, "interval_max": RECONNECT_SECONDS}
            return super().ensure_connection(failed, *args, **{**kwargs, **pauses, "callback": called_each_second})

    class Amqp(AMQP):
        Connection = DispatchConnection

    return Amqp


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
        broker = RedisAddress.parse(redis_url).celery_url
        amqp = _amqp_for_dispatches(
            self._take, self.invalid, self._polled, self.thread.mark_progress, self._unreachable
        )
        celery: Any = Celery("zeta", broker=broker, amqp=amqp, set_as_current=False)
        celery.conf.update(
            broker_connection_retry_on_startup=True,
            broker_connection_max_retries=None,
            broker_connection_timeout=2.0,
            broker_transport_options={
                "socket_connect_timeout": 2.0,
                "socket_timeout": SILENCE_SECONDS,  # without it, a connection that is never answered blocks forever
                "health_check_interval": SILENCE_SECONDS,  # kombu drops a connection whose blocking pop is overdue
                "socket_keepalive": True,
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
