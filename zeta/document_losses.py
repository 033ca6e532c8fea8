"""Reads the losses of a job's final model on its held-out documents."""

from __future__ import annotations

from zeta.errors import parse_response
from zeta.transport import HttpTransport
from zeta_core.contract.errors import InvalidRequest, NotFound
from zeta_core.contract.job.comparison import DOCUMENT_LOSSES_FILE, MIN_DOCUMENTS, DocumentLosses
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.status import JobStatus

TRAINING_STATE = "training_state"


def read_document_losses(transport: HttpTransport, job: Job) -> DocumentLosses:
    """The losses stored with the final checkpoint. Raises `InvalidRequest` if the job has none."""
    if job.status != JobStatus.SUCCEEDED:
        raise InvalidRequest(
            f"Job {job.id} is {job.status}; only jobs that succeeded can be compared.", code="job_not_succeeded"
        )
    path = f"/v1/jobs/{job.id}/checkpoints/final/files/{TRAINING_STATE}/{DOCUMENT_LOSSES_FILE}"
    try:
        return parse_response(DocumentLosses, transport.request("GET", path))
    except NotFound as error:
        raise InvalidRequest(
            f"Job {job.id} has no losses of single documents. Runs with at least {MIN_DOCUMENTS} held-out documents "
            "(eval_split or eval_dataset) store them, except with preferences or compile, and except runs of older "
            f"versions; rerun it with held-out data: zeta rerun {job.id} --set eval_split=0.1",
            code="no_document_losses",
        ) from error
