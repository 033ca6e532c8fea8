"""Applies the messages of workers to the database, in groups, and replies after the commit.

Any number of servers may read the same stream: its consumer group delivers each message to one of them, and the job's
row lock serializes them. Messages that are waiting are verified together and applied in one transaction, in their
order; those of a job that another transaction has locked follow alone, so a slow job doesn't delay the others. If the
transaction fails, its messages are applied one by one, so a message that can't be applied affects no other.

Guarantees: a reply is sent and a message is removed only after the transaction was committed; a message that can't be
applied is removed and counted, and doesn't block the others. Workers repeat messages that are lost with a server or
with Redis.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from server.database.availability import DatabaseUnavailable
from server.database.connections import Database
from server.engine.apply_message import Effects, apply_message, apply_together
from server.engine.event_signal import EventSignal
from server.engine.job_traces import JobTraces
from server.engine.message_stream import MessageStream
from server.engine.redis_client import DroppedMessages, send_to_workers
from server.engine.signed_messages import Entry, SignedMessages
from server.engine.worker_secrets import WorkerSecrets
from server.settings import ServerSettings
from zeta_core.contract.wire.messages import (
    FROM_WORKER,
    SERVER_STREAM,
    CheckResult,
    Claim,
    ClaimAnswer,
    FromWorker,
    JournalBatch,
)
from zeta_core.contract.wire.signatures import BadMessage, BadSender
from zeta_core.system.outage import error_text

MAX_GROUP_LINES = 1_000  # journal lines that one transaction stores; a single message may contain more
MAX_TRIES = 20  # for a message that the database keeps rejecting although it is writable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReceivedMessage:
    """A verified message and the id of its entry in the stream."""

    entry_id: bytes
    message: FromWorker


class MessageConsumer:
    """One consumer of the group; ``attempt_ended`` is called after a commit that freed a slot."""

    def __init__(
        self,
        database: Database,
        redis: Redis,
        settings: ServerSettings,
        secrets: WorkerSecrets,
        event_signal: EventSignal,
        dropped: DroppedMessages,
        attempt_ended: Callable[[], None],
        traces: JobTraces,
    ) -> None:
        self._database = database
        self._redis = redis
        self._secrets = secrets
        self._messages = SignedMessages(secrets)
        self._stream = MessageStream(redis, dropped)
        self._max_events = settings.max_job_events
        self._event_signal = event_signal
        self._dropped = dropped
        self._attempt_ended = attempt_ended
        self._traces = traces
        self._tries: tuple[bytes, int] = (b"", 0)  # the last message that the database rejected, and how often

    async def one_pass(self) -> None:
        """Read some messages and apply them. Raises `RedisUnavailable` and `DatabaseUnavailable`."""
        entries = await self._stream.read()
        try:
            received = await self._verify(entries)
            for group in _groups(received):
                alone = await self._apply_together(group) if len(group) > 1 else group
                for each in alone:
                    await self._apply_alone(each)
        except Exception:
            self._stream.read_again()
            raise

    async def leave(self) -> None:
        """Remove this consumer and its pending messages from the group; the workers repeat those messages."""
        await self._stream.leave()

    async def _verify(self, entries: Sequence[Entry]) -> list[ReceivedMessage]:
        """The valid messages; the others are counted and removed."""
        results = await self._messages.read_once(self._redis, FROM_WORKER, entries, channel=SERVER_STREAM)
        received: list[ReceivedMessage] = []
        invalid: list[bytes] = []
        for (entry_id, _), result in zip(entries, results, strict=True):
            error = result if isinstance(result, BadMessage) else _impersonation_error(*result)
            if error is None and not isinstance(result, BadMessage):
                received.append(ReceivedMessage(entry_id, result[1]))
            elif error is not None:
                self._dropped.count_invalid("stream", error)
                invalid.append(entry_id)
        await self._stream.remove(invalid)
        return received

    async def _apply_together(self, group: Sequence[ReceivedMessage]) -> Sequence[ReceivedMessage]:
        """Apply the messages in one transaction; returns those that must be applied alone."""
        try:
            async with self._database.write() as session:
                messages = [each.message for each in group]
                effects = await apply_together(session, messages, max_events=self._max_events)
        except DatabaseUnavailable:
            return group  # the first of them finds out whether the outage continues, or which message causes it
        except Exception as error:  # noqa: BLE001 - the message that causes it is reported when it is applied alone
            logger.warning("%d messages are applied one by one, because: %s", len(group), error_text(error))
            return group
        await self._finish([(each, effect) for each, effect in zip(group, effects, strict=True) if effect is not None])
        return [each for each, effect in zip(group, effects, strict=True) if effect is None]

    async def _apply_alone(self, received: ReceivedMessage) -> None:
        """Apply one message in its own transaction. It stays in the stream only while the database is unavailable."""
        try:
            async with self._database.write() as session:
                effects = await apply_message(session, received.message, max_events=self._max_events)
        except DatabaseUnavailable as error:
            if not await self._has_tried_enough(received.entry_id):
                raise
            self._dropped.count_unapplied(
                f"Removed a message that the writable database rejected {MAX_TRIES} times ({error_text(error)}). "
                "Workers repeat claims and events until they are answered.",
                error,
            )
            effects = Effects()
        except Exception as error:  # noqa: BLE001 - the messages behind it must not be blocked
            self._dropped.count_unapplied(
                f"Removed a message because of a defect in this server ({type(error).__name__}: {error_text(error)}). "
                "Workers repeat claims and events until they are answered.",
                error,
            )
            effects = Effects()
        await self._finish([(received, effects)])

    async def _has_tried_enough(self, entry_id: bytes) -> bool:
        """Count a rejected try of this message. Raises `DatabaseUnavailable` if the database isn't writable at all.

        Then the message is not the cause, and tries don't count, however long the outage lasts.
        """
        try:
            await self._database.check_writable()
        except DatabaseUnavailable:
            self._tries = (b"", 0)
            raise
        last, tries = self._tries
        self._tries = (entry_id, tries + 1 if last == entry_id else 1)
        return self._tries[1] >= MAX_TRIES

    async def _finish(self, applied: Sequence[tuple[ReceivedMessage, Effects]]) -> None:
        """After the commit: notify readers, send the replies, and remove the messages."""
        for received, effects in applied:
            message = received.message
            if effects.rejection is not None:
                self._dropped.count_invalid("stream", effects.rejection)
            if effects.changes_job and not isinstance(message, CheckResult):
                self._event_signal.notify(message.job_id)
            if isinstance(message, Claim):
                _log_claim(message, effects)
            if effects.is_traced and isinstance(message, JournalBatch):
                await self._traces.record(message.job_id, message.attempt)
        if any(effects.ends_attempt for _, effects in applied):
            self._attempt_ended()
        replies = [
            (reply, self._secrets.key_for_sending(worker))
            for _, effects in applied
            for worker, reply in effects.replies
        ]
        await send_to_workers(self._redis, replies)
        await self._stream.remove([received.entry_id for received, _ in applied])


def _impersonation_error(sender: str, message: FromWorker) -> BadSender | None:
    """The error if a worker sent the message in the name of another one."""
    if message.worker == sender:
        return None
    return BadSender(f"worker {sender} sent a {message.kind} in the name of worker {message.worker!r}")


def _groups(received: Sequence[ReceivedMessage]) -> Generator[Sequence[ReceivedMessage]]:
    """The messages in their order, in groups for one transaction each."""
    group: list[ReceivedMessage] = []
    num_lines = 0
    for each in received:
        added = len(each.message.lines) if isinstance(each.message, JournalBatch) else 0
        if group and num_lines + added > MAX_GROUP_LINES:
            yield group
            group, num_lines = [], 0
        group.append(each)
        num_lines += added
    if group:
        yield group


def _log_claim(claim: Claim, effects: Effects) -> None:
    for _, answer in effects.replies:
        assert isinstance(answer, ClaimAnswer), "a claim is answered with a ClaimAnswer"
        logger.info(
            "Attempt %d of %s on %s: %s.",
            claim.attempt,
            claim.job_id,
            claim.worker,
            "granted" if answer.granted else f"denied, {answer.reason}",
            extra={"action": "claim", "job_id": claim.job_id, "attempt": claim.attempt},
        )
