"""``POST /v1/jobs/preview``: a worker renders rows of a job's data, token by token, as training would read them."""

from __future__ import annotations

from typing import Any

from server.auth import Caller
from server.estimates.sequence_counts import has_fixed_content
from server.service import Service
from server.submitting.acceptance import accept, read_spec
from zeta_core.contract.errors import InvalidRequest, Unavailable
from zeta_core.contract.job.data_preview import PreviewRequest, RowSelection, ShownRows
from zeta_core.contract.spec.sources import JobModel, dataset_sources
from zeta_core.contract.spec.validation import error_from_details, parse

_NO_MODEL: dict[str, Any] = {"config": {"model_type": "llama"}}  # lets a spec without a model be validated


async def preview(service: Service, caller: Caller, body: Any) -> ShownRows:
    """The requested rows. Raises the errors of a submission, and `Unavailable` if no worker has rendered them in time.

    A row that training would reject is returned with its error.
    """
    request = parse(PreviewRequest, body, error_class=InvalidRequest)
    spec = await read_spec(service, caller, {"model": _NO_MODEL, **request.spec})
    async with service.database.read() as session:
        accepted = await accept(session, service, caller, spec)
    spec_to_check: dict[str, Any] = dict(request.spec)
    if isinstance(spec.model, JobModel):
        spec_to_check["model"] = accepted.resolved_spec.model
    answer = await service.engine.spec_checks.request(
        caller.project,
        spec_to_check,
        accepted.resolved_spec,
        1,
        hub=caller.limits.hub_access,
        reuse=all(has_fixed_content(source) for source in dataset_sources(spec.dataset)),
        shown=RowSelection(rows=request.rows, row=request.row),
    )
    if isinstance(answer, str):
        raise Unavailable(f"The rows can't be shown: {answer}", code="no_preview")
    if not answer.ok:
        raise error_from_details(list(answer.details))
    if answer.shown is None:
        raise Unavailable("The worker has an older version, which can't show rows; upgrade it.", code="no_preview")
    return answer.shown
