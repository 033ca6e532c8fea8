"""Returns the receipts of jobs, and the public key that verifies them."""

from __future__ import annotations

from server.auth import Caller
from server.database.receipt_tables import ReceiptRow
from server.jobs.queries import find_job
from server.receipt_signing import find_receipt_checkpoint, private_key, try_to_sign
from server.service import Service
from zeta_core.contract.errors import Conflict, NotFound
from zeta_core.contract.job.status import ENDED
from zeta_core.contract.receipt import Receipt, ReceiptKey, key_id


async def get_receipt(service: Service, caller: Caller, job_id: str) -> Receipt:
    """The receipt of an ended job; if the job ended before the service signed receipts, it is signed now.

    Raises `NotFound`, also if the job has no checkpoint, and `Conflict` before the job's end, or if the receipt can't
    be signed.
    """
    async with service.database.read() as session:
        job = await find_job(session, caller, job_id)
        row = await session.get(ReceiptRow, job_id)
        checkpoint = await find_receipt_checkpoint(session, job_id)
    if job.status not in ENDED:
        raise Conflict(
            f"Job {job_id} is {job.status}; it has a receipt once it has ended (`zeta wait {job_id}`).",
            code="job_not_ended",
        )
    if row is None or row.signed_at is None:
        envelope = await try_to_sign(service.database, service.artifacts, job_id)
    else:
        envelope = None if row.envelope is None else Receipt.model_validate(row.envelope)
    if envelope is None and checkpoint is not None:
        raise Conflict(
            f"The receipt of {job_id} can't be signed, because its checkpoint {checkpoint!r} is damaged or missing, "
            "or its run has reported invalid data; the log of the server names the reason.",
            code="receipt_not_signed",
        )
    if envelope is None:
        raise NotFound(
            f"Job {job_id} ended ({job.status}) without a checkpoint, so there is no receipt.", code="receipt_not_found"
        )
    return envelope


async def get_receipt_key(service: Service) -> ReceiptKey:
    """The public key of the installation, which is created at its first use."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = (await private_key(service.database)).public_key()
    raw = public.public_bytes_raw()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    return ReceiptKey(keyid=key_id(raw), public_key=pem)
