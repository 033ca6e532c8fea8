"""Signs a receipt for every ended job with a checkpoint.

The end of a job inserts a row without an envelope, and a background loop signs it, so that a later change of the
artifact store doesn't change what the receipt states. The key belongs to the installation: all of its servers use the
one in the database.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from server.artifacts import Artifacts
from server.database.checkpoints import checkpoints_newest_first
from server.database.connections import Database
from server.database.inserts import dialect_insert
from server.database.receipt_tables import ReceiptKeyRow, ReceiptRow
from server.database.tables import AttemptRow, CheckpointRow, JobRow
from zeta_core.contract.errors import Unavailable
from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.job import Attempt
from zeta_core.contract.receipt import (
    PAYLOAD_TYPE,
    DataFile,
    Receipt,
    Signature,
    Statement,
    Subject,
    Training,
    key_id,
    signed_bytes,
    statement_bytes,
    to_base64,
)
from zeta_core.contract.secret_texts import masked_values
from zeta_core.contract.wire.run_directory import MANIFEST_NAME
from zeta_core.system.artifact_store import StoredCheckpoint
from zeta_core.system.distribution import version

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PACE_SECONDS = 2.0
MAX_JOBS = 500  # of one pass
_KEY_NUMBER = 1

logger = logging.getLogger(__name__)


async def sign_receipts(database: Database, artifacts: Artifacts) -> None:
    """Sign the receipts of jobs that have ended since the last pass; those without a checkpoint get none."""
    unsigned = select(ReceiptRow.job_id).where(ReceiptRow.signed_at.is_(None)).order_by(ReceiptRow.created_at)
    async with database.read() as session:
        ids = list(await session.scalars(unsigned.limit(MAX_JOBS)))
        stored = select(CheckpointRow.job_id).where(CheckpointRow.job_id.in_(ids)).distinct()
        with_checkpoint = set(await session.scalars(stored)) if ids else set[str]()
    without = [job_id for job_id in ids if job_id not in with_checkpoint]
    if without:
        async with database.write() as session:
            done = update(ReceiptRow).where(ReceiptRow.job_id.in_(without), ReceiptRow.signed_at.is_(None))
            await session.execute(done.values(signed_at=utc_now()))
    for job_id in ids:
        if job_id in with_checkpoint:
            await try_to_sign(database, artifacts, job_id)


async def try_to_sign(database: Database, artifacts: Artifacts, job_id: str) -> Receipt | None:
    """Sign and store the receipt of an ended job; ``None`` if it has no checkpoint, was deleted, or can't be signed."""
    try:
        return await _sign_receipt(database, artifacts, job_id)
    except Unavailable as error:  # a damaged manifest
        logger.warning("No receipt for %s: %s", job_id, error.message, extra={"action": "receipt"})
    except (AssertionError, ValueError):  # of what a worker reported; the receipts of other jobs must not wait
        logger.exception("No receipt for %s, because its data is invalid.", job_id, extra={"action": "receipt"})
    return await _store(database, job_id, None)


async def _sign_receipt(database: Database, artifacts: Artifacts, job_id: str) -> Receipt | None:
    """Sign and store the receipt of an ended job; ``None`` if it has no checkpoint or was deleted."""
    async with database.read() as session:
        job = await session.get(JobRow, job_id)
        name = await find_receipt_checkpoint(session, job_id)
        rows = await session.scalars(select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(AttemptRow.attempt))
        attempts = [_to_attempt(row) for row in rows]
    if job is None:
        return None
    stored = await asyncio.to_thread(artifacts.checkpoint, job_id, name) if name is not None else None
    envelope = None
    if stored is not None:
        base = job.resolved_spec.job_model
        base_stored = None
        if base is not None:
            base_stored = await asyncio.to_thread(artifacts.checkpoint, base.job, base.checkpoint)
        statement = _statement(job, attempts, stored, base_stored)
        envelope = _sign(await private_key(database), statement_bytes(statement))
    return await _store(database, job_id, envelope)


def _statement(
    job: JobRow, attempts: list[Attempt], stored: StoredCheckpoint, base: StoredCheckpoint | None
) -> Statement:
    resolved = job.resolved_spec
    manifest_sha256 = hashlib.sha256(stored.manifest_bytes).hexdigest()
    files = [(file.path, file.sha256) for file in stored.manifest.files]
    subject = [
        Subject(name=str(PurePosixPath(path)), digest={"sha256": sha256})
        for path, sha256 in sorted([*files, (MANIFEST_NAME, manifest_sha256)])
    ]
    assert job.finished_at is not None, f"{job.id} has ended"
    model = resolved.job_model
    recorded = resolved.as_json()
    predicate = Training(
        job=job.id,
        project=job.project,
        name=job.entity_name,
        status=job.status,
        created_at=job.created_at,
        finished_at=job.finished_at,
        checkpoint=stored.manifest.name,
        manifest_sha256=manifest_sha256,
        spec=masked_values({name: value for name, value in job.spec.items() if name != "notify"}),
        resolved_spec=masked_values(recorded),
        files=[DataFile(id=file_id, **file.model_dump()) for file_id, file in sorted(resolved.files.items())],
        base_checkpoint=None if model is None else f"{model.job}/{model.checkpoint}",
        base_manifest_sha256=None if base is None else hashlib.sha256(base.manifest_bytes).hexdigest(),
        data_fingerprint=resolved.data_fingerprint,
        base_fingerprint=resolved.base_fingerprint,
        attempts=attempts,
        versions=resolved.versions,
        server_version=version(),
    )
    return Statement(subject=subject, predicate=predicate)


def _sign(key: Ed25519PrivateKey, payload: bytes) -> Receipt:
    raw = key.public_key().public_bytes_raw()
    signature = key.sign(signed_bytes(PAYLOAD_TYPE, payload))
    return Receipt(payload=to_base64(payload), signatures=[Signature(keyid=key_id(raw), sig=to_base64(signature))])


async def _store(database: Database, job_id: str, envelope: Receipt | None) -> Receipt | None:
    """Store a receipt unless there is one, and return the stored one."""
    async with database.write() as session:
        if await session.get(JobRow, job_id) is None:
            return None
        row = await session.get(ReceiptRow, job_id, with_for_update=True)
        if row is None:
            row = ReceiptRow(job_id=job_id, created_at=utc_now())
            session.add(row)
        if row.envelope is not None:
            return Receipt.model_validate(row.envelope)
        row.signed_at = utc_now()
        row.envelope = None if envelope is None else envelope.model_dump(mode="json", by_alias=True)
    return envelope


async def find_receipt_checkpoint(session: AsyncSession, job_id: str) -> str | None:
    """The checkpoint that the receipt is about: ``final``, or the newest one if the job has no final one."""
    names = list(await session.scalars(checkpoints_newest_first(job_id)))
    return FINAL_CHECKPOINT if FINAL_CHECKPOINT in names else next(iter(names), None)


async def private_key(database: Database) -> Ed25519PrivateKey:
    """The key in the database, which the first server that needs it creates."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # loaded at the first signature

    async with database.read() as session:
        row = await session.get(ReceiptKeyRow, _KEY_NUMBER)
    if row is None:
        text = to_base64(Ed25519PrivateKey.generate().private_bytes_raw())
        async with database.write() as session:
            values = {"number": _KEY_NUMBER, "private_key": text, "created_at": utc_now()}
            await session.execute(dialect_insert(session, ReceiptKeyRow).values(**values).on_conflict_do_nothing())
            row = await session.get_one(ReceiptKeyRow, _KEY_NUMBER)
    return Ed25519PrivateKey.from_private_bytes(base64.b64decode(row.private_key))


def _to_attempt(row: AttemptRow) -> Attempt:
    names = ("attempt", "worker", "device_kind", "started_at", "finished_at", "reason", "first_step", "last_step")
    return Attempt.model_validate({name: getattr(row, name) for name in names})
