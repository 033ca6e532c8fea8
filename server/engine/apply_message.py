"""Applies the messages of workers to the database, each alone or many in one transaction.

The caller commits the transaction and then carries out the `Effects`. A message that has no effect, because it repeats
another one or comes from an old attempt, is answered like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel
from sqlalchemy import select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import AttemptRow
from server.database.transitions import lock_jobs
from server.engine.apply_journal import apply_batch
from server.engine.attempt_claims import answer_claim
from server.engine.nodes.starts import answer_prepared
from server.engine.spec_checks import store_result
from zeta_core.contract.wire.messages import CheckResult, Claim, FromWorker, JournalBatch, Prepared
from zeta_core.contract.wire.signatures import BadSender


@dataclass(frozen=True)
class Effects:
    """The work that remains after the commit.

    ``replies`` names the worker of each reply. ``changes_job``: readers of the job's events are notified.
    ``is_traced``: the job's start is complete, so its trace can be recorded.
    """

    replies: Sequence[tuple[str, BaseModel]] = ()
    changes_job: bool = False
    ends_attempt: bool = False
    is_traced: bool = False
    rejection: BadSender | None = None


async def apply_message(session: AsyncSession, message: FromWorker, *, max_events: int) -> Effects:
    """Apply one message. ``max_events`` is the limit of `apply_batch`."""
    match message:
        case Claim():
            return Effects([(message.worker, await answer_claim(session, message))], changes_job=True)
        case Prepared():
            return Effects(await answer_prepared(session, message), changes_job=True)
        case JournalBatch():
            return await _apply_batch(session, message, max_events)
        case CheckResult():
            if await store_result(session, message):
                return Effects()
            reason = f"worker {message.worker} sent the result of a check that it was not asked for"
            return Effects(rejection=BadSender(reason))


async def apply_together(
    session: AsyncSession, messages: Sequence[FromWorker], *, max_events: int
) -> list[Effects | None]:
    """Apply messages in their order; ``None`` for those of jobs that are missing or locked by another transaction.

    The transaction waits for no other one, so the messages of a job that another transaction has locked must be applied
    alone.
    """
    job_ids = {message.job_id for message in messages if not isinstance(message, CheckResult)}
    jobs = await lock_jobs(session, job_ids)
    keys = {(message.job_id, message.attempt) for message in messages if isinstance(message, JournalBatch)}
    # The session finds them by their keys, without further queries, as long as this list exists.
    attempts = await _attempts(session, keys)
    effects = [
        await apply_message(session, message, max_events=max_events)
        if isinstance(message, CheckResult) or message.job_id in jobs
        else None
        for message in messages
    ]
    del attempts
    return effects


async def _attempts(session: AsyncSession, keys: set[tuple[str, int]]) -> Sequence[AttemptRow]:
    if not keys:
        return []
    query = select(AttemptRow).where(tuple_(AttemptRow.job_id, AttemptRow.attempt).in_(keys))
    return (await session.scalars(query)).all()


async def _apply_batch(session: AsyncSession, batch: JournalBatch, max_events: int) -> Effects:
    applied = await apply_batch(session, batch, max_events=max_events)
    rejection = None
    if applied.holder is not None:
        rejection = BadSender(
            f"worker {batch.worker} reported on attempt {batch.attempt} of {batch.job_id}, which worker "
            f"{applied.holder} holds"
        )
    return Effects(
        [(batch.worker, applied.ack)],
        changes_job=applied.num_applied > 0,
        ends_attempt=applied.attempt_ended,
        is_traced=applied.is_first_step or applied.ended_before_first_step,
        rejection=rejection,
    )
