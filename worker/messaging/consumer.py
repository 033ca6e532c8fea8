"""The Celery side: one queue of this worker's own, whose only task checks a hand-over and passes it on at once.

Acknowledged early (a late acknowledgement would start a long task a second time when the broker's visibility timeout
ends, celery issue 5935) and never prefetched behind a busy task: what is lost with this process is handed over again by
the server. Runs in a thread, so that the main thread's supervising loop alone hears the signals.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import redis
from celery import Celery
from celery.app.amqp import AMQP
from celery.worker import state
from kombu.connection import Connection
from pydantic import ValidationError

from worker.outage import Outage
from worker.settings import WorkerSettings
from zeta_core.contract.messages import START_TASK, BadSignature, HandOver, verify, worker_queue

RESTART_SECONDS = 2.0
RECONNECT_SECONDS = 1.0
STOP_SECONDS = 3.0
EX_OK = 0

logger = logging.getLogger(__name__)


class _PromptConnection(Connection):
    """Tries every second; Celery itself rests longer and longer, so that after an outage it comes back 30 s late."""

    def ensure_connection(self, *args: Any, **kwargs: Any) -> Any:
        rests = {"interval_start": RECONNECT_SECONDS, "interval_step": 0, "interval_max": RECONNECT_SECONDS}
        return super().ensure_connection(*args, **{**kwargs, **rests})


class _Amqp(AMQP):
    Connection = _PromptConnection


class _FailureFilter(logging.Filter):
    """Takes what ended a controller out of Celery's log, which would have it at every new try."""

    def __init__(self, tell: Callable[[BaseException], None]) -> None:
        super().__init__()
        self._tell = tell

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if record.levelno < logging.CRITICAL or error is None:
            return True
        self._tell(error)
        return False


class Consumer:
    """Puts every valid `HandOver` into ``inbox``."""

    def __init__(self, settings: WorkerSettings, inbox: SimpleQueue[Any]) -> None:
        self._queue = worker_queue(settings.worker_name)
        self._name = settings.worker_name
        self._secret = settings.worker_secret
        self._inbox = inbox
        self._stopped = threading.Event()
        self._celery = self._build(settings.redis_url)
        self._thread = threading.Thread(target=self._consume, name="celery", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def begin_to_stop(self) -> None:
        """Take no more messages; they stay in the queue, and the server hands them over elsewhere."""
        self._stopped.set()
        state.should_stop = EX_OK

    def stop(self) -> None:
        self.begin_to_stop()
        self._thread.join(STOP_SECONDS)

    def _build(self, redis_url: str) -> Any:
        celery: Any = Celery("zeta", broker=redis_url, amqp=_Amqp, set_as_current=False)
        celery.conf.update(
            broker_connection_retry_on_startup=True,
            broker_connection_max_retries=None,
            broker_connection_timeout=2.0,
            broker_transport_options={"socket_connect_timeout": 2.0, "socket_keepalive": True},
            task_acks_late=False,
            task_ignore_result=True,
            worker_prefetch_multiplier=1,
            worker_disable_prefetch=True,
            worker_enable_remote_control=False,
            worker_hijack_root_logger=False,
            worker_redirect_stdouts=False,
            worker_send_task_events=False,
        )

        @celery.task(name=START_TASK)
        def start(fields: dict[str, str]) -> None:  # pyright: ignore[reportUnusedFunction]
            self._take_in(fields)

        return celery

    def _take_in(self, fields: dict[str, str]) -> None:
        try:
            message = HandOver.model_validate(verify(fields, self._secret, channel=self._queue))
        except (BadSignature, ValidationError, ValueError, AttributeError) as error:
            logger.warning("A hand-over was dropped: %s", error, extra={"action": "bad_message"})
            return
        self._inbox.put(message)

    def _consume(self) -> None:
        outage = Outage(f"The queue {self._queue} cannot be read")

        def tell(error: BaseException) -> None:
            # What Redis says explains itself: a key of a wrong type, a right that is missing.
            outage.began(error, with_traceback=not isinstance(error, redis.RedisError | OSError))

        def ready(_consumer: object) -> None:
            outage.ended()

        failures = _FailureFilter(tell)
        logging.getLogger("celery.worker").addFilter(failures)
        while not self._stopped.is_set():
            try:
                controller: Any = self._celery.WorkController(
                    hostname=f"zeta@{self._name}",
                    pool="threads",
                    concurrency=1,
                    queues=[self._queue],
                    without_gossip=True,
                    without_mingle=True,
                    without_heartbeat=True,
                    ready_callback=ready,
                )
                controller.start()
            except Exception as error:  # noqa: BLE001 - told by the one who knows how often
                # Celery itself goes on over a lost broker; anything else must not leave a worker that hears nothing.
                tell(error)
            self._stopped.wait(RESTART_SECONDS)
        logging.getLogger("celery.worker").removeFilter(failures)
